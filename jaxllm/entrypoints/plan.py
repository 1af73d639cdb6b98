"""``jaxllm plan`` says what an engine would need on devices that need not be there, ``jaxllm explain`` how that comes
about.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from jaxllm.command_options import add_engine_options, add_model_argument, engine_arguments
from jaxllm.config.devices import DEVICE_NAMES
from jaxllm.engine.interrupt import whole_module


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add what both commands take; the parser has to resolve conflicts, for the options that mean more here."""
    add_engine_options(parser)
    add_model_argument(parser, "as --model, or a config.json: no weights are needed")
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help=f"{', '.join(DEVICE_NAMES)}; auto (default): what this machine has",
    )
    parser.add_argument(
        "--compiler",
        metavar="DIR",
        help="where JAX's CUDA compiler is (default: this environment, or where the plan says that it should be)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes are bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 when the model fits, 1 when it does not."""
    found = _print(whole_module("jaxllm.planning.api").plan, arguments)
    return 0 if found.fits else 1


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the explanation; 0 when the model fits, 1 when it does not."""
    found = _print(whole_module("jaxllm.planning.api").explain, arguments)
    return 0 if found.plan.fits else 1


def _print(make: Callable[..., Any], arguments: argparse.Namespace) -> Any:
    model, given = engine_arguments(arguments)
    found = make(model, compiler=arguments.compiler, **given)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return found
