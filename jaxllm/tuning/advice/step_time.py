"""A step takes a fixed time, to read the weights and to launch it, and a time for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

#: steps that a line is drawn through
FEWEST_STEPS = 8


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step: ``fixed + token * tokens``."""

    fixed: float
    token: float

    def __call__(self, num_tokens: float) -> float:
        return self.fixed + self.token * num_tokens

    @classmethod
    def of(cls, steps: Mapping[str, np.ndarray]) -> StepTime | None:
        """The line through the medians of the device's times for each size of step, each weighted by its steps; None
        where there are too few steps, or all have one size.

        Args:
            steps: of a trace.
        """
        sizes = np.where(steps["bucket_tokens"] > 0, steps["bucket_tokens"], _tokens(steps))
        kept = (steps["num_drafted_tokens"] == 0) & (sizes >= _tokens(steps))
        sizes, times = sizes[kept], steps["device_time"][kept]
        if len(sizes) < FEWEST_STEPS or len(different := np.unique(sizes)) < 2:
            return None
        medians = np.array([np.median(times[sizes == size]) for size in different])
        weights = np.sqrt([np.count_nonzero(sizes == size) for size in different])
        token, fixed = np.polyfit(different, medians, 1, w=weights)
        return cls(max(float(fixed), 0.0), max(float(token), 0.0))


def _tokens(steps: Mapping[str, np.ndarray]) -> np.ndarray:
    return steps["num_prefill_tokens"] + steps["num_decode_tokens"]
