"""What the host gets of a launched step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxllm.runner.runner import StepResult


class Computed:
    """Stands for an array that the device has not finished."""

    waited = False

    def block_until_ready(self) -> None:
        self.waited = True


def test_a_step_that_samples_nothing_is_waited_for():
    computed: Any = Computed()
    packed: Any = SimpleNamespace(sampled_entries=np.zeros(0, np.int32), targets=None)
    result = StepResult(None, None, packed, 2, None, computed)
    assert not computed.waited
    assert list(result.result().token_ids) == [-1, -1]
    assert computed.waited
