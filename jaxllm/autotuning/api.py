"""`jaxllm.tune` searches the engine arguments that suit a workload best."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.capacity import Capacity, Planner, quiet
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.result import TuningResult
from jaxllm.autotuning.tuner import Tuner
from jaxllm.config.devices import gpu_named
from jaxllm.config.log import show_log
from jaxllm.engine.observe.trace import Trace
from jaxllm.planning.api import HERE
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload
from jaxllm.tuning.simulation.workload_file import read_workload


def tune(
    model: str | os.PathLike[str],
    /,
    workload: Workload | Trace | str | os.PathLike[str],
    *,
    objective: str = "throughput",
    constraints: str | Iterable[str] = (),
    device: str = "auto",
    num_devices: int | None = None,
    output: str | os.PathLike[str] | None = None,
    num_trials: int = 100,
    num_measured: int = 3,
    rounds: int = 3,
    use_tqdm: bool | Callable[..., Any] = True,
    **arguments: Any,
) -> TuningResult:
    """Search the engine arguments that suit a workload best: in the simulator first, then the best few are measured in
    turns on this machine. Ctrl-C gives the best so far.

    Args:
        model: as the engine takes it; for a device that is not there, a config.json is enough.
        workload: requests with their lengths and arrival times: a trace, or a file of one, or of lines of JSON
            (`jaxllm.tuning.simulation`).
        objective: "throughput" (output tokens a second), "latency" (the median from arrival to the last token) or
            "goodput" (requests a second that keep to the limits of the constraints).
        constraints: such as "p99 ttft<2s", "p50 itl<50ms", "e2e<10s" (its 99th percentile) or "throughput>500"; several
            in a list, or with commas between them.
        device: a GPU's name (`jaxllm.config.devices`) simulates engines for it, from the plan and the device's rates:
            it need not be there, and nothing is measured. "auto", "cpu" or "gpu": this machine's.
        num_devices: of a device that is not there; None: as many as the arguments ask for.
        output: a folder, for ``config.yaml``, ``report.html`` and ``trials.jsonl``, from which the same question goes
            on where it was interrupted; None: nothing is kept.
        num_trials: that are sampled in the simulator.
        num_measured: of the best, measured beside the defaults; 0: none but the defaults, which calibrate it.
        rounds: of each; medians count. Up to three times as many where it is not clear yet which is the fastest, since
            what the rounds do not show to be better than the defaults is not taken.
        use_tqdm: False shows no progress bar; a callable makes the bar, with tqdm's arguments.
        **arguments: the engine's, which are held fixed.

    Raises:
        TypeError: an argument does not exist.
        ValidationError: the question cannot be asked, no engine is possible, or Optuna is not installed.
    """
    show_log()
    goals = Goals.of(objective, constraints)
    found = as_workload(workload)
    name = device.strip().lower()
    local = name in HERE
    if local and num_devices is not None:
        raise ValidationError(
            f"num_devices={num_devices} is for a device that is not there (device='h100'); here there are as many as "
            "JAX has."
        )
    if local and name != "auto":
        arguments = {"device": "cpu" if name == "cpu" else "gpu", **arguments}
    # None stands for the default of every argument
    arguments = {name: value for name, value in arguments.items() if value is not None}
    folder = None if output is None else Path(output)
    options: dict[str, Any] = {}
    if local:
        planner = Planner(model, arguments)
        described = _described_here(planner)
    else:
        if num_devices is not None and num_devices < 1:
            raise ValidationError(f"num_devices must be at least 1, got {num_devices}.")
        gpu = gpu_named(device)
        planner = Planner(model, arguments, gpu=gpu, num_devices=num_devices)
        described = f"{planner.num_devices} x {gpu.description}, which need not be here"
        options = _absent(planner, gpu.name)
    tuner = Tuner(
        planner=planner, workload=found, goals=goals, folder=folder, device=described, num_trials=num_trials,
        num_measured=num_measured, rounds=rounds, show=use_tqdm, **options,
    )  # fmt: skip
    result = tuner.run()
    if folder is not None:
        result.save(folder)
    return result


def as_workload(workload: Any) -> Workload:
    """Raises ValidationError for what is none, TypeError for what cannot be one."""
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, Trace):
        return Workload.of_trace(workload)
    if isinstance(workload, str | os.PathLike):
        return read_workload(Path(workload))
    raise TypeError(f"workload must be a Workload, a Trace, or the path of a file; got {type(workload).__name__}")


def _described_here(planner: Planner) -> str:
    from jaxllm.runner.compile.target import find_device

    device = find_device(str(planner.fixed.get("device") or "auto"))
    if device.platform == "cpu":
        return f"this machine's CPU ({os.cpu_count()} processors)"
    return f"{planner.num_devices} x {device.device_kind}"


def _absent(planner: Planner, device: str) -> dict[str, Any]:
    """What a search for a device that is not there has in place of measurements."""
    from jaxllm.tuning.simulation.absent import absent_engine
    from jaxllm.tuning.simulation.roofline_steps import BEST

    @functools.cache
    def steps(key: str) -> Any:
        given = {**planner.fixed, **json.loads(key)}
        given.pop("data_parallel_size", None)
        with quiet():
            return absent_engine(planner.model, device=device, **given)[1]

    def step_times(capacity: Capacity) -> StepTimes:
        return steps(json.dumps(dict(capacity.arguments), sort_keys=True))

    def fastest(capacity: Capacity) -> StepTimes:
        return steps(json.dumps(dict(capacity.arguments), sort_keys=True)).with_efficiency(BEST)

    return {"step_times": step_times, "fastest_steps": fastest}
