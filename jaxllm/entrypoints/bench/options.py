"""The options of the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxllm.entrypoints.options import DEFAULT_MODEL


def add_tokenizer_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench tokenizer`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="pool sizes to compare")
    parser.add_argument("--num-prompts", type=int, default=2000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--input-len", type=int, default=256, metavar="N", help="tokens a prompt (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="runs, alternating (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the numbers there")
