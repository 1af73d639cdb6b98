"""``jaxllm tune`` searches the engine arguments that suit a workload best."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench.workload_options import add_workload_options, is_described, workload_of
from jaxllm.command_options import add_engine_options, add_model_argument, engine_arguments
from jaxllm.config.devices import DEVICE_NAMES
from jaxllm.engine.interrupt import whole_module

if TYPE_CHECKING:
    from jaxllm.tuning.simulation.workload import Workload

#: datasets whose prompts are texts that somebody has written
_WRITTEN = ("sharegpt", "custom")


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes; the parser has to resolve conflicts, for the options that mean more here."""
    add_engine_options(parser)
    add_model_argument(parser, "as --model; for a device that is not there, a config.json is enough")
    parser.add_argument(
        "--objective",
        choices=("throughput", "latency", "goodput"),
        default="throughput",
        help="output tokens a second; the median from arrival to the last token; or requests a second that keep to the "
        "limits of all constraints (default: %(default)s)",
    )
    parser.add_argument(
        "--constraint",
        action="append",
        default=[],
        metavar="TEXT",
        help="such as 'p99 ttft<2s', 'p50 itl<50ms', 'e2e<10s' (its 99th percentile) or 'throughput>500'; may be "
        "repeated",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for config.yaml, report.html, and the trials, with "
                        "which the same command goes on where it was interrupted (default: tune-MODEL)")  # fmt: skip
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help=f"{', '.join(DEVICE_NAMES)}: need not be there, and nothing is measured; auto (default): what this "
        "machine has",
    )
    parser.add_argument(
        "--num-devices",
        type=int,
        metavar="N",
        help="of a device that is not there (default: what the arguments ask for)",
    )
    parser.add_argument("--num-trials", type=int, default=100, metavar="N", help="in the simulator (default: 100)")
    parser.add_argument(
        "--num-measured", type=int, default=3, metavar="N", help="of the best, beside the defaults (default: 3)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="of each; medians count; up to three times as many where settings are close (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_workload_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search, write, and print; 0 where the constraints are kept, 1 where nothing keeps them, 130 after Ctrl-C."""
    model, given = engine_arguments(arguments)
    folder = arguments.output or default_folder(model)
    result = whole_module("jaxllm.autotuning.api").tune(
        model,
        _workload(arguments),
        objective=arguments.objective,
        constraints=arguments.constraint,
        num_devices=arguments.num_devices,
        num_trials=arguments.num_trials,
        num_measured=arguments.num_measured,
        rounds=arguments.rounds,
        output=folder,
        **given,
    )
    if arguments.json:
        print(json.dumps(result.to_dict(), default=str))
    else:
        print(result)
        print(f"written: {folder / 'config.yaml'} (--config takes it), {folder / 'report.html'}")
    if result.interrupted:
        return 130
    return 0 if result.feasible else 1


def default_folder(model: Any) -> Path:
    """Named after the model: a file without its suffix, a config.json as its folder."""
    path = Path(os.path.abspath(Path(str(model)).expanduser()))
    if path.name == "config.json":
        path = path.parent
    # a point in a model's name ends no name
    return Path(f"tune-{path.stem if path.suffix in ('.gguf', '.json') else path.name}")


def _workload(arguments: argparse.Namespace) -> Workload:
    """The file's, or the dataset's. Of tokens that were drawn only what they share means something: drafts of them
    would never be right, and are not to be tried.
    """
    if not is_described(arguments):
        raise ValidationError(
            "the best settings are those of a workload: give --workload FILE (a trace, or lines of JSON), or a "
            "dataset's shape and size, such as --dataset-name sharegpt_like --num-prompts 100 --request-rate 4."
        )
    found = workload_of(arguments)
    if arguments.workload is not None or arguments.dataset_name in _WRITTEN:
        return found
    blind = (dataclasses.replace(each, piece_ids=tuple(map(hash, each.piece_ids))) for each in found.requests)
    return dataclasses.replace(found, requests=tuple(blind))
