"""``jaxllm simulate`` says how a trace's requests would have fared with other settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxllm.api.errors import ValidationError

_COUNTS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "num_gpu_blocks_override",
    "num_decode_steps",
)
_SWITCHES = ("enable_prefix_caching", "enable_chunked_prefill", "async_scheduling", "enforce_eager")


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file that trace.save(FILE) wrote")
    group = parser.add_argument_group("settings that are tried in place of the trace's own")
    for name in _COUNTS:
        group.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N")
    for name in _SWITCHES:
        group.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what was measured and what is simulated."""
    from jaxllm.tuning.simulation.replay import replay
    from jaxllm.tuning.trace_file import read_trace

    given = {name: getattr(arguments, name) for name in (*_COUNTS, *_SWITCHES)}
    found = replay(read_trace(arguments.trace), {name: value for name, value in given.items() if value is not None})
    print(json.dumps(found.to_dict()) if arguments.json else found)
    return 0


def _count(text: str) -> int:
    from jaxllm.config.argument_checks import at_least

    try:
        return at_least(1)("the value", text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
