"""What the host gets of a launched step."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.runner.heads.sampling_rows import NOTHING_LOST, PackedStep
from jaxllm.runner.heads.step_results import StepResult


class Computed:
    """Stands for an array that the device has not finished."""

    waited = False

    def block_until_ready(self) -> None:
        self.waited = True


def test_a_step_that_samples_nothing_is_waited_for():
    computed: Any = Computed()
    packed = PackedStep(np.zeros(0, np.int32), None, False, False, False, 2, np.zeros(0, np.int32), None, [])
    result = StepResult(None, None, packed, NOTHING_LOST, computed)
    assert not computed.waited
    output = result.result()
    assert output.token_ids == [] and output.counts == [0, 0]
    assert computed.waited
