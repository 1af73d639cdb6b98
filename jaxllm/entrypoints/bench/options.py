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


def add_host_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench host`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and sizes (default: %(default)s)")
    parser.add_argument(
        "--num-seqs", type=int, nargs="+", default=[1, 32, 256, 1024], metavar="N", help="running sequences to compare"
    )
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="steps that count (default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=200, metavar="N", help="steps before, that do not (default: %(default)s)"
    )
    parser.add_argument("--stream", action="store_true", help="deliver every token, not one output a request")
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="cpu",
        help="processor time of the engine's thread, which other programs disturb less, or wall-clock time "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--real-launch",
        action="store_true",
        help="launch a tiny model instead of nothing, so that uploads, launches and downloads are real",
    )
    parser.add_argument(
        "--prefix-cache",
        type=int,
        metavar="N",
        help="also compare N sequences with and without a prefix cache, at a hit rate of 0",
    )
    parser.add_argument(
        "--step-ms", type=float, default=10.0, metavar="MS", help="what that is a share of (default: %(default)s)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the most sequences")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the numbers there")
