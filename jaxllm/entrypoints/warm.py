"""``jaxllm warm`` fills the compile cache ahead of the first start."""

from __future__ import annotations

import argparse
import json

from jaxllm.command_options import add_engine_options, engine_arguments
from jaxllm.engine.interrupt import whole_module


def add_warm_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_engine_options(parser)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="as --model")
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes are bytes")


def run(arguments: argparse.Namespace) -> int:
    """Compile, and print what the cache has by now."""
    model, given = engine_arguments(arguments)
    warm = whole_module("jaxllm.startup.warm").warm
    from jaxllm.config.engine_args import engine_args
    from jaxllm.config.log import show_log

    show_log()
    report = warm(engine_args(model, **given))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0
