"""``jaxllm simulate`` says how a workload fares with arguments that nobody has run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench.workload_options import add_workload_options, check_workload_options
from jaxllm.command_options import add_engine_options, build_llm, engine_arguments
from jaxllm.config.devices import GPUS

if TYPE_CHECKING:
    from jaxllm.tuning.simulation.forecast import Forecast

#: that say how long steps take
_OPTIONS = {"measure": "--measure", "gpu": "--device", "steps_of": "--steps-of"}


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes; the parser has to resolve conflicts."""
    add_engine_options(parser)
    add_workload_options(parser)
    parser.add_argument("workload", nargs="?", default=argparse.SUPPRESS, metavar="FILE", help="as --workload")
    times = parser.add_argument_group("step times", "of a trace, its own; else one of these")
    times.add_argument("--measure", action="store_true", help="start the engine here, and time steps of each size")
    times.add_argument("--device", dest="gpu", choices=tuple(GPUS), help="of a GPU that need not be here, at its rates")
    times.add_argument(
        "--compiler", action="store_true", help="with --device: plan the memory by JAX's CUDA compiler, for a minute"
    )
    times.add_argument(
        "--steps-of", type=Path, metavar="TRACE", help="of another trace, whose settings hold where none are given"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what is simulated, beside what was measured where something was."""
    given = [name for name in _OPTIONS if getattr(arguments, name)]
    if len(given) > 1:
        names = " and ".join(_OPTIONS[name] for name in given)
        raise ValidationError(f"{names} both say how long steps take: give one of them.")
    if arguments.compiler and not arguments.gpu:
        raise ValidationError("--compiler plans the memory of --device: give one, such as --device h100.")
    found = _forecast(arguments)
    if arguments.plot is not None:
        found.save_plot(arguments.plot)
    print(json.dumps(found.to_dict()) if arguments.json else found)
    return 0


def _forecast(arguments: argparse.Namespace) -> Forecast:
    from jaxllm.bench.workload_options import workload_of
    from jaxllm.tuning.simulation import forecasts
    from jaxllm.tuning.simulation.fitted_steps import FittedSteps
    from jaxllm.tuning.simulation.replay import replay
    from jaxllm.tuning.trace_file import read_trace

    path = None if arguments.workload is None else Path(arguments.workload)
    model, given = engine_arguments(arguments)
    if arguments.gpu:
        return forecasts.on_absent(model, workload_of(arguments), arguments.gpu, given, exact=arguments.compiler)
    if arguments.measure:
        workload = workload_of(arguments)
        with build_llm(arguments) as llm:
            return forecasts.on_engine(llm, workload)
    if hasattr(arguments, "model"):
        raise ValidationError("--model is for --measure and --device: a trace says how long its model's steps take.")
    other = None if arguments.steps_of is None else read_trace(arguments.steps_of)
    trace = path if path is not None and path.suffix == ".json" else None
    if trace is not None and other is None and _is_other_traffic(arguments):
        other = read_trace(trace)
    elif trace is not None and not _is_other_traffic(arguments):
        check_workload_options(arguments)
        steps: Any = None if other is None else FittedSteps.of(other.arrays())
        return replay(read_trace(trace), _changes(given), step_times=steps)
    if other is None:
        raise ValidationError(
            "how long do steps take? Give --measure (this machine), --device h100 or another GPU, or --steps-of TRACE."
        )
    return forecasts.by_trace(other, workload_of(arguments), _changes(given))


def _is_other_traffic(arguments: argparse.Namespace) -> bool:
    """Whether requests are to come otherwise than a trace has them."""
    fewer = arguments.num_prompts is not None or arguments.max_concurrency is not None
    return fewer or math.isfinite(arguments.request_rate)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are tried in place of a trace's own."""
    return {name: value for name, value in given.items() if name not in ("model", "seed", "tokenizer")}
