"""``jaxllm advise`` says which argument would have helped, of a trace or of a server's metrics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxllm.api.errors import ValidationError

_SECONDS = {"ms": 1e-3, "s": 1.0}
#: without these, advice about rows and budgets says less
_TOLD = ("max_num_seqs", "max_num_batched_tokens")


def add_advise_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("trace", nargs="?", type=Path, metavar="TRACE", help="a file that trace.save(FILE) wrote")
    parser.add_argument(
        "--vllm-metrics", metavar="FILE|URL", help="metrics of a vLLM (or jaxllm) server, such as http://localhost:8000/metrics"
    )  # fmt: skip
    parser.add_argument(
        "--itl", metavar="TIME", help="the time that may lie between two tokens of a request, such as 50ms"
    )
    group = parser.add_argument_group("what the server was started with, which its metrics do not say")
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_speculative_tokens"):
        group.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, one for each advice")


def run(arguments: argparse.Namespace) -> int:
    """Print the advice; 0 whether there is any or none."""
    from jaxllm.tuning.advice.advise import advise, load_of_trace
    from jaxllm.tuning.advice.read import read_metrics
    from jaxllm.tuning.trace_file import read_trace

    given = {
        name: getattr(arguments, name)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_speculative_tokens")
    }
    if (arguments.trace is None) == (arguments.vllm_metrics is None):
        raise ValidationError("give either a trace or --vllm-metrics, such as `jaxllm advise trace.json`.")
    if arguments.vllm_metrics is None:
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValidationError(f"--{wrong[0].replace('_', '-')} is for --vllm-metrics: a trace says what it was.")
        load = load_of_trace(read_trace(arguments.trace))
    else:
        load = read_metrics(arguments.vllm_metrics, given)
    found = advise(load, itl=None if arguments.itl is None else _seconds(arguments.itl))
    if arguments.json:
        for advice in found:
            print(json.dumps(advice.to_dict()))
    else:
        print(found)
        if arguments.trace is None and (unknown := [name for name in _TOLD if getattr(load.settings, name) is None]):
            options = " and ".join(f"--{name.replace('_', '-')}" for name in unknown)
            print(f"Metrics do not say what {options} was: with it, more can be told.")
    return 0


def _seconds(text: str) -> float:
    unit = "ms" if text.endswith("ms") else "s"
    try:
        return float(text.removesuffix(unit)) * _SECONDS[unit]
    except ValueError:
        raise ValidationError(f"--itl must be a time such as 50ms or 0.05s, got {text!r}.") from None


def _count(text: str) -> int:
    from jaxllm.config.argument_checks import at_least

    try:
        return at_least(1)("the value", text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
