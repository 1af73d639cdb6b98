"""What a trace measured, what the simulator says of the same, and what it says of other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.trace import Trace
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.settings import changed
from jaxllm.tuning.simulation.simulate import simulate
from jaxllm.tuning.simulation.simulated_run import SHOWN, SimulatedRun, table
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Prints as a table."""

    measured: SimulatedRun
    #: with the trace's own settings
    same: SimulatedRun
    #: with others; None: there are none
    changed: SimulatedRun | None
    changes: Mapping[str, Any]
    model: StepTimes

    def error(self, name: str) -> float | None:
        """By how much the simulator is off with the trace's own settings, relative to what was measured; None where
        nothing was.
        """
        measured, same = self.measured.to_dict()[name], self.same.to_dict()[name]
        if measured is None or same is None:
            return None
        return (same - measured) / measured if measured else float(same != 0)

    def __str__(self) -> str:
        runs = {"measured": self.measured, "simulated": self.same}
        if self.changed is not None:
            runs[", ".join(f"{name}={value}" for name, value in self.changes.items())] = self.changed
        errors = {name: self.error(name) for name, _, _ in SHOWN}
        texts = {name: "-" if error is None else f"{error:+.1%}" for name, error in errors.items()}
        lines = [table(runs, {"error": texts})]
        lines.append(
            "error: with the trace's own settings, whose steps' total time the model was made to have; with others "
            "expect several times the error of the times to the first token"
        )
        lines.append(str(self.model))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return {
            "measured": self.measured.to_dict(),
            "simulated": self.same.to_dict(),
            "changed": None if self.changed is None else self.changed.to_dict(),
            "changes": dict(self.changes),
            "error": {name: self.error(name) for name, _, _ in SHOWN},
            "steps": str(self.model),
        }


def replay(trace: Trace, changes: Mapping[str, Any]) -> Replay:
    """The trace's requests, at their times, with its settings and with `changes` to them.

    Raises:
        ValidationError: the trace has too little, is of several replicas, or the settings are not simulated.
    """
    settings = trace.settings
    if settings is None or not any(request.num_output_tokens for request in trace.requests):
        raise ValidationError("the trace has no requests, or no settings of an engine.")
    if len(trace.engines) > 1:
        raise ValidationError(f"the trace is of {len(trace.engines)} replicas; simulations are of one so far.")
    if changes.get("enable_prefix_caching") and not settings.enable_prefix_caching:
        raise ValidationError(
            "enable_prefix_caching cannot be switched on: a trace of an engine without it does not name what prompts "
            "share. Take one with enable_prefix_caching=True."
        )
    workload = Workload.of_trace(trace)
    model = FittedSteps.of(trace.arrays())
    others = changed(settings, changes) if changes else None
    return Replay(
        measured=SimulatedRun.of_trace(trace),
        same=simulate(workload, settings, model),
        changed=None if others is None else simulate(workload, others, model),
        changes=changes,
        model=model,
    )
