"""What a trace measured, what the simulator says of the same, and what it says of other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.trace import Trace
from jaxllm.tuning.simulation import Fared, simulate
from jaxllm.tuning.step_model import StepModel
from jaxllm.tuning.workload import recorded

#: names, headings and factors of what is shown
_ROWS = (
    ("throughput", "output tokens/s", 1.0),
    ("ttft_p50", "TTFT, median, ms", 1e3),
    ("ttft_p99", "TTFT, 99th percentile, ms", 1e3),
    ("itl_p50", "ITL, median, ms", 1e3),
    ("itl_p99", "ITL, 99th percentile, ms", 1e3),
    ("seconds", "seconds", 1.0),
    ("preemptions", "preemptions", 1.0),
    ("hit_rate", "prefix hit rate", 1.0),
    ("kv_cache_usage_max", "KV cache, at most", 1.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Prints as a table."""

    measured: Fared
    #: with the trace's own settings
    same: Fared
    #: with others; None: there are none
    changed: Fared | None
    changes: Mapping[str, Any]
    model: StepModel

    def error(self, name: str) -> float:
        """By how much the simulator is off with the trace's own settings, relative to what was measured. Its steps were
        fitted to these, and take as long in all: of throughput it says nothing, and of other settings little.
        """
        measured, same = self.measured.to_dict()[name], self.same.to_dict()[name]
        return (same - measured) / measured if measured else float(same != 0)

    def __str__(self) -> str:
        columns = {"measured": self.measured.to_dict(), "simulated": self.same.to_dict()}
        if self.changed is not None:
            columns[", ".join(f"{name}={value}" for name, value in self.changes.items())] = self.changed.to_dict()
        width = max(map(len, columns))
        lines = [f"{'':28}" + "".join(f"{name:>{max(width, 11) + 2}}" for name in columns) + "   error"]
        for name, heading, factor in _ROWS:
            numbers = "".join(f"{factor * column[name]:>{max(width, 11) + 2}.2f}" for column in columns.values())
            lines.append(f"{heading:28}{numbers}   {self.error(name):+.1%}")
        lines.append(
            "error: with the trace's own settings, whose steps' total time the model was made to have; with others "
            "expect several times the error of the times to the first token"
        )
        lines.append(
            f"a step takes {1e3 * self.model.fixed:.2f} ms, "
            f"{1e6 * self.model.token:.1f} us a token and {1e9 * self.model.kv_token:.1f} ns a token in the cache"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return {
            "measured": self.measured.to_dict(),
            "simulated": self.same.to_dict(),
            "changed": None if self.changed is None else self.changed.to_dict(),
            "changes": dict(self.changes),
            "error": {name: self.error(name) for name, _, _ in _ROWS},
            "model": dataclasses.asdict(self.model),
        }


def replay(trace: Trace, changes: Mapping[str, Any]) -> Replay:
    """The trace's requests, at their times, with its settings and with `changes` to them.

    Raises:
        ValidationError: the trace has too little, is of several replicas, or the settings are not simulated.
    """
    settings, workload = trace.settings, recorded(trace.requests)
    if settings is None or not workload:
        raise ValidationError("the trace has no requests, or no settings of an engine.")
    if len(trace.engines) > 1:
        raise ValidationError(f"the trace is of {len(trace.engines)} replicas; simulations are of one so far.")
    model = StepModel.of(trace.arrays(), settings)
    changed = _changed(settings, changes) if changes else None
    begins = max(0.0, trace.steps[0].start - min(request.queued for request in trace.requests))
    return Replay(
        measured=measured(trace),
        same=simulate(workload, settings, model, begins=begins),
        changed=None if changed is None else simulate(workload, changed, model, begins=begins),
        changes=changes,
        model=model,
    )


def measured(trace: Trace) -> Fared:
    """How the requests fared that a trace has seen from their arrival to their end."""
    done = [each for each in trace.requests if each.first_token is not None and each.last_token is not None]
    queued, first, last = (np.array([getattr(each, name) for each in done], float)
                           for name in ("queued", "first_token", "last_token"))  # fmt: skip
    counts = np.array([each.num_output_tokens for each in done])
    several, arrays = counts > 1, trace.arrays()
    return Fared(
        seconds=float(last.max() - queued.min()) if len(done) else 0.0,
        num_requests=len(done),
        output_tokens=int(counts.sum()),
        ttft=first - queued,
        itl=(last - first)[several] / (counts[several] - 1),
        preemptions=int(arrays["num_preemptions"].sum()),
        prompt_tokens=sum(each.num_prompt_tokens for each in done),
        cached_tokens=sum(each.num_cached_tokens for each in done),
        kv_cache_usage=arrays["kv_cache_usage"],
        times=arrays["start"],
    )


def _changed(settings: EngineSettings, changes: Mapping[str, Any]) -> EngineSettings:
    given = dict(changes)
    if "num_gpu_blocks_override" in given:
        given["num_blocks"] = given.pop("num_gpu_blocks_override")
    if "block_size" in given and settings.block_size:
        raise ValidationError("block_size cannot change: a trace names what prompts share by blocks of its own size.")
    if given.get("enable_prefix_caching") and not settings.enable_prefix_caching:
        raise ValidationError(
            "enable_prefix_caching cannot be switched on: a trace of an engine without it does not name what prompts "
            "share. Take one with enable_prefix_caching=True."
        )
    return dataclasses.replace(settings, **given)
