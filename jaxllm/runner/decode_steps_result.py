"""What a launch of several steps leaves to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxllm.engine.step import StepOutput

if TYPE_CHECKING:
    import jax

    from jaxllm.runner.rows import PackedStep


class DecodeStepsResult:
    """A launch of several steps (`interface.StepFuture`).

    Args:
        sampled: i32 [at least `num_steps`, S], as `decode_steps` returns it.
    """

    def __init__(self, sampled: jax.Array | np.ndarray, packed: PackedStep, num_steps: int):
        self._sampled, self._packed, self._num_steps = sampled, packed, num_steps

    def result(self) -> StepOutput:
        entries = self._packed.sampled_entries
        ids = np.empty((self._num_steps, len(entries)), np.int32)
        ids[:, entries] = np.asarray(self._sampled)[: self._num_steps, : len(entries)]
        first, *later = ids.tolist()
        return StepOutput(token_ids=first, later_token_ids=later)
