"""How long steps take: a fixed time, a time for each token that is computed, and one for each that is attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.optimize import nnls

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.engine_settings import EngineSettings

#: steps that are fitted, at least
FEWEST_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepModel:
    """Seconds; none is negative."""

    #: of the device
    fixed: float
    token: float
    kv_token: float
    #: of the host before a launch
    host: float = 0.0
    host_request: float = 0.0

    def device_seconds(self, num_tokens: int, num_kv_tokens: int) -> float:
        """Of a step.

        Args:
            num_tokens: with those of its padding.
            num_kv_tokens: that requests hold in the KV cache.
        """
        return self.fixed + self.token * num_tokens + self.kv_token * num_kv_tokens

    def host_seconds(self, num_requests: int) -> float:
        """Of a step with so many requests."""
        return self.host + self.host_request * num_requests

    @classmethod
    def of(cls, steps: Mapping[str, np.ndarray], settings: EngineSettings) -> StepModel:
        """The one with the least squares of relative errors over a trace's steps (Lawson and Hanson's NNLS).

        Raises:
            ValidationError: there are fewer than `FEWEST_STEPS` steps.
        """
        tokens = steps["num_prefill_tokens"] + steps["num_decode_tokens"]
        sizes = np.where(steps["bucket_tokens"] > 0, steps["bucket_tokens"], tokens)
        times = steps["device_time"]
        kept = (times > 0) & (tokens <= sizes)
        if kept.sum() < FEWEST_STEPS:
            raise ValidationError(f"the trace has {int(kept.sum())} steps to learn from; {FEWEST_STEPS} are needed.")
        kv_tokens = steps["kv_cache_usage"] * ((settings.num_blocks or 1) - 1) * (settings.block_size or 1)
        device = _fit(times[kept], np.ones(kept.sum()), sizes[kept], kv_tokens[kept])
        launching = steps["schedule_time"] + steps["launch_time"] + steps["update_time"] + steps["output_time"]
        host = _fit(np.maximum(launching[kept], 1e-9), np.ones(kept.sum()), steps["num_seqs"][kept])
        return cls(fixed=device[0], token=device[1], kv_token=device[2], host=host[0], host_request=host[1])


def _fit(times: np.ndarray, *features: np.ndarray) -> list[float]:
    """Factors of the features that make the times, a time's tenth being as bad wherever it is; and all of them together
    as long as the times are, which have outliers on one side.
    """
    # what is out of all proportion is somebody else's
    kept = times <= 5 * np.median(times) if len(times) > 50 else np.ones(len(times), bool)
    matrix = np.stack(features, axis=1)[kept] / times[kept, None]
    scales = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    found, _ = nnls(matrix / scales, np.ones(kept.sum()))
    factors = found / scales
    modelled = float((np.stack(features, axis=1) @ factors).sum())
    return [float(value) for value in factors * (times.sum() / modelled if modelled else 1.0)]
