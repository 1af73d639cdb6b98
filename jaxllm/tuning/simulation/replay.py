"""What a trace measured, what the simulator says of the same, and what it says of other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.trace import Trace
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.forecast import Forecast, relative_errors, worst
from jaxllm.tuning.simulation.settings import changed
from jaxllm.tuning.simulation.simulate import simulate
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload

MEASURED, SIMULATED = "measured", "simulated"


def replay(trace: Trace, changes: Mapping[str, Any], *, step_times: StepTimes | None = None) -> Forecast:
    """The trace's requests, at their times, with its settings and with `changes` to them.

    Args:
        step_times: from elsewhere; None: fitted to the trace's own steps. The error is then that of two simulations, of
            which each was fitted to one half of the steps.

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
    workload, measured = Workload.of_trace(trace), SimulatedRun.of_trace(trace)
    steps = trace.arrays()
    model = FittedSteps.of(steps) if step_times is None else step_times
    runs = {MEASURED: measured, SIMULATED: simulate(workload, settings, model)}
    if step_times is not None:
        errors = relative_errors(runs[SIMULATED], measured)
        errors_of = "error: of the simulation with the trace's own settings, whose steps it was not fitted to"
    else:
        halves = FittedSteps.of_halves(steps)
        errors = worst([relative_errors(simulate(workload, settings, half), measured) for half in halves])
        errors_of = (
            "error: with the trace's own settings, the larger one of two simulations that were fitted to one half of "
            "its steps each"
        )
    if changes:
        name = ", ".join(f"{name}={value}" for name, value in changes.items())
        runs[name] = simulate(workload, changed(settings, changes), model)
        errors_of += "; of steps of other sizes than it has seen, expect more"
    return Forecast(workload=workload, runs=runs, step_times=model, errors=errors, errors_of=errors_of)
