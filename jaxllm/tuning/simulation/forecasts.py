"""Forecasts of a workload: on an engine that runs, on a GPU that is not there, on the engine of a trace."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.tuning.simulation.forecast import Forecast, relative_errors
from jaxllm.tuning.simulation.measure import measure_steps
from jaxllm.tuning.simulation.roofline_steps import BEST
from jaxllm.tuning.simulation.settings import changed
from jaxllm.tuning.simulation.simulate import checked, simulate
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.workload import Workload

if TYPE_CHECKING:
    from jaxllm.engine.observe.trace import Trace
    from jaxllm.llm import LLM

#: requests, and tokens of prompts and outputs at most, of the run that tells how far off a forecast is
_TRIED, _TRIED_PROMPT, _TRIED_OUTPUT = 12, 192, 24


def on_engine(llm: LLM, workload: Workload, changes: Mapping[str, Any] | None = None) -> Forecast:
    """A running engine is measured, and the workload simulated with its settings. It has to be idle.

    The error is that of a short run of other requests, of mixed lengths, that no step was fitted to.

    Args:
        changes: arguments to simulate in place of the engine's own.

    Raises:
        ValidationError: there are several replicas, the settings are not simulated, or cut requests off.
    """
    settings: Any = llm.engine.watching.settings
    if llm.engine.args.data_parallel_size > 1:
        raise ValidationError("a simulation is of one replica: leave data_parallel_size out.")
    others = changed(settings, changes or {})
    checked(workload, others)
    steps = measure_steps(llm, most_requests=max(len(workload), _TRIED))
    trace = _tried(llm)
    measured = SimulatedRun.of_trace(trace)
    errors = relative_errors(simulate(Workload.of_trace(trace), settings, steps), measured)
    run = simulate(workload, others, steps)
    return Forecast(
        workload=workload,
        runs={"simulated": run},
        step_times=steps,
        errors=errors,
        errors_of=f"error: of a simulation of {measured.num_requests} other requests, which were measured as well",
    )


def on_absent(
    model: str | os.PathLike[str],
    workload: Workload,
    device: str,
    arguments: Mapping[str, Any],
    *,
    exact: bool = False,
) -> Forecast:
    """The workload on a GPU that need not be there, at the share of its rates that is likely, and at all of them.

    Args:
        exact: as `absent_engine` has it.
    """
    from jaxllm.tuning.simulation.absent import absent_engine

    settings, steps = absent_engine(model, device=device, exact=exact, **arguments)
    best = steps.with_efficiency(BEST)
    return Forecast(
        workload=workload,
        runs={"at all its rates": simulate(workload, settings, best), "likely": simulate(workload, settings, steps)},
        step_times=steps,
        errors={},
        errors_of="error: unknown, since nothing was measured; the columns are bounds of what to expect",
    )


def by_trace(trace: Trace, workload: Workload, changes: Mapping[str, Any]) -> Forecast:
    """Another workload on the engine of a trace. The error is that of the trace's own requests (`replay`)."""
    from jaxllm.tuning.simulation.replay import replay

    own = replay(trace, {})
    assert trace.settings is not None
    run = simulate(workload, changed(trace.settings, changes), own.step_times)
    return Forecast(
        workload=workload,
        runs={"simulated": run},
        step_times=own.step_times,
        errors=own.errors,
        errors_of=f"{own.errors_of}, and its own requests",
    )


def _tried(llm: LLM) -> Trace:
    """The trace of a run of mixed lengths, with an empty prefix cache."""
    draw, plan = random.Random(1), llm.memory_plan
    vocabulary = range(llm.engine.model_files.config.model.vocab_size)
    prompts: list[Any] = []
    params: list[SamplingParams] = []
    longest = min(_TRIED_PROMPT, plan.max_model_len // 2)
    for _ in range(_TRIED):
        tokens = draw.choices(vocabulary, k=draw.randint(max(longest // 8, 1), longest))
        outputs = draw.randint(1, min(_TRIED_OUTPUT, plan.max_model_len - len(tokens)))
        prompts.append({"prompt_token_ids": tokens})
        params.append(SamplingParams(max_tokens=outputs, ignore_eos=True, temperature=0.0, detokenize=False))
    llm.reset_prefix_cache()
    with llm.trace() as trace:
        llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    return trace
