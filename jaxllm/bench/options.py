"""The options of the benchmarks: vLLM's names, where it has them."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxllm.command_options import DEFAULT_MODEL, add_engine_options
from jaxllm.config.command_line import count

DATASETS = ("random", "sharegpt", "sharegpt_like", "prefix_repetition", "custom")


def add_tokenizer_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench tokenizer`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer (default: %(default)s)")
    parser.add_argument(
        "--workers", type=positive, nargs="+", default=[1, 2, 4], metavar="N", help="pool sizes to compare"
    )
    parser.add_argument("--num-prompts", type=positive, default=2000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--input-len", type=positive, default=256, metavar="N", help="tokens a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=positive, default=5, metavar="N", help="runs, alternating (default: %(default)s)"
    )
    parser.add_argument("--output-json", type=output_file, metavar="FILE", help="write the numbers there")


def add_host_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench host`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and sizes (default: %(default)s)")
    parser.add_argument(
        "--num-seqs",
        type=positive,
        nargs="+",
        default=[1, 32, 256, 1024],
        metavar="N",
        help="running sequences to compare",
    )
    parser.add_argument(
        "--steps", type=positive, default=400, metavar="N", help="steps that count (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-up",
        type=not_negative,
        default=200,
        metavar="N",
        help="steps before, that do not (default: %(default)s)",
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
        type=positive,
        metavar="N",
        help="also compare N sequences with and without a prefix cache, at a hit rate of 0",
    )
    parser.add_argument(
        "--step-ms",
        type=milliseconds,
        default=10.0,
        metavar="MS",
        help="step of a device that --prefix-cache gives its cost as a share of (default: %(default)s)",
    )
    parser.add_argument("--trace", type=output_file, metavar="FILE", help="write a Chrome trace of the largest number")
    parser.add_argument("--compare", choices=["vllm"], help="also time vLLM's scheduler, on the same requests")
    _add_peer_python(parser)
    parser.add_argument("--output-json", type=output_file, metavar="FILE", help="write the numbers there")


def add_throughput_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench throughput`` takes."""
    add_dataset_options(parser)
    _add_iterations(parser, num_iters=3, num_iters_warmup=1)
    parser.add_argument(
        "--sweep-num-prompts", type=counts, metavar="N,N,...", help="measure datasets of these sizes, one after another"
    )
    parser.add_argument(
        "--no-phases",
        action="store_true",
        help="do not measure prefill and decode apart, which takes a second, shorter run in each iteration",
    )
    _add_detokenize(parser)
    _add_outputs(parser, plot="draw tokens per second against the number of requests")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--compare",
        metavar="NAME,NAME,...",
        help="run these engines on the same requests, in turns: transformers, transformers-continuous, llama.cpp, "
        "vllm. All run in one dtype (default: bfloat16), greedily, to the same lengths, without detokenizing",
    )
    _add_peer_python(group)
    group.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="the model for llama.cpp (default: converted from the model's own file)",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="cores for each engine (default: all)")
    group.add_argument(
        "--include-startup",
        action="store_true",
        help="start every engine anew for each iteration, and count from its process's start to the last token",
    )
    add_engine_options(parser)


def add_latency_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench latency`` takes."""
    for name, default, text in (
        ("input-len", 32, "tokens of each prompt"),
        ("output-len", 128, "tokens to generate for each"),
        ("batch-size", 8, "requests in the batch"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    _add_iterations(parser, num_iters=30, num_iters_warmup=10)
    group = parser.add_argument_group("sweeps, which time the tokens after the first")
    group.add_argument("--sweep-context", type=counts, metavar="N,N,...", help="with prompts of these lengths")
    group.add_argument("--sweep-blocks", type=counts, metavar="N,N,...", help="with KV caches of these many blocks")
    _add_detokenize(parser)
    _add_outputs(parser, plot="draw milliseconds per token against context or blocks")
    add_engine_options(parser)


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench profile`` takes."""
    parser.add_argument(
        "--batch-sizes",
        type=counts,
        default=[1, 8, 32],
        metavar="N,N,...",
        help="requests of each batch (default: 1,8,32)",
    )
    for name, default, text in (
        ("input-len", 32, "tokens of each prompt"),
        ("output-len", 21, "tokens to generate for each"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    _add_outputs(parser, plot=None)
    add_engine_options(parser)


def add_startup_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench startup`` takes."""
    for name, default, text in (
        ("num-iters-cold", 3, "starts with an empty compile cache"),
        ("num-iters-warmup", 1, "starts that fill the cache and do not count"),
        ("num-iters-warm", 3, "starts with the cache filled"),
    ):
        parser.add_argument(
            f"--{name}", type=not_negative, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--input-len", type=positive, default=32, metavar="N", help="tokens of the prompt (default: %(default)s)"
    )
    _add_outputs(parser, plot=None)
    add_engine_options(parser)


def add_serve_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench serve-trace`` takes."""
    add_dataset_options(parser)
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help='requests a second (default: the "timestamp" seconds of a custom dataset\'s lines, else all at once)',
    )
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="1: requests come as a Poisson process; below: in bursts; above: evenly (default: %(default)s)",
    )
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help="most requests at a time")
    _add_detokenize(parser)
    _add_outputs(parser, plot=None)
    add_engine_options(parser)


def add_dataset_options(parser: argparse.ArgumentParser, *, num_prompts: int = 1000) -> None:
    """Add which requests to make. The seed is the engine's argument ``--seed``."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset-name",
        choices=DATASETS,
        default="random",
        help="random tokens; a ShareGPT JSON file; random tokens with ShareGPT's lengths; random tokens with shared "
        "beginnings; or a JSONL file of prompts (default: %(default)s)",
    )
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="of sharegpt and custom")
    group.add_argument("--num-prompts", type=positive, default=num_prompts, metavar="N", help="(default: %(default)s)")
    group.add_argument("--input-len", type=positive, metavar="N", help="tokens of a random prompt (default: 1024)")
    group.add_argument(
        "--output-len",
        type=positive,
        metavar="N",
        help="tokens to generate (default: what the dataset says; random and prefix_repetition: 128)",
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="draw lengths from [n (1 - R), n (1 + R)] (default: %(default)s)",
    )
    group.add_argument(
        "--random-prefix-len",
        type=not_negative,
        default=0,
        metavar="N",
        help="tokens before these that all random prompts share (default: %(default)s)",
    )
    for name, kind, default in (
        ("prefix-len", not_negative, 256),
        ("suffix-len", positive, 256),
        ("num-prefixes", positive, 10),
    ):
        group.add_argument(
            f"--prefix-repetition-{name}", type=kind, default=default, metavar="N", help="(default: %(default)s)"
        )


def positive(text: str) -> int:
    """A whole number above 0."""
    number = count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1")
    return number


def counts(text: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


def not_negative(text: str) -> int:
    """A whole number that is not below 0."""
    number = count(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return number


def milliseconds(text: str) -> float:
    """A time above 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def output_file(text: str) -> Path:
    """A file that can be written: what takes minutes to find must not be lost in the end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        return path  # a device or a pipe
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror or error}") from None
    if new:
        path.unlink()
    return path


def _add_iterations(parser: argparse.ArgumentParser, *, num_iters: int, num_iters_warmup: int) -> None:
    parser.add_argument(
        "--num-iters", type=positive, default=num_iters, metavar="N", help="runs; medians count (default: %(default)s)"
    )
    parser.add_argument(
        "--num-iters-warmup",
        type=not_negative,
        default=num_iters_warmup,
        metavar="N",
        help="runs before, which do not count (default: %(default)s)",
    )


def _add_detokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--disable-detokenize", action="store_true", help="generate token ids without text")


def _add_peer_python(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the Python that an engine is installed for (may be repeated; default: this one)",
    )


def _add_outputs(parser: argparse.ArgumentParser, *, plot: str | None) -> None:
    parser.add_argument(
        "--output-json", type=output_file, metavar="FILE", help="write samples, medians, versions and machine there"
    )
    if plot:
        parser.add_argument("--plot", type=output_file, metavar="FILE", help=f"{plot} (.png, .svg, .pdf)")
