"""The benchmarks, as commands: their options have vLLM's names, where it has them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.command_options import DEFAULT_MODEL, add_engine_options
from jaxllm.config.option_values import (
    counts,
    json_object,
    milliseconds,
    not_negative,
    output_file,
    positive,
    shares,
)

#: (height, width, frames) -> its share; vLLM's default
BUCKETS = "{(256, 256, 1): 0.5, (720, 1280, 1): 0.5}"
#: kinds of workloads that are simulated and measured
_SIMULATED = ("decode", "prefill", "mixed", "prefixes")
DATASETS = ("random", "sharegpt", "sharegpt_like", "prefix_repetition", "custom", "random-mm")


class Benchmark(NamedTuple):
    """One command ``jaxllm bench NAME``; the module of its name has its `run`."""

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]


def add_benchmarks(bench: argparse.ArgumentParser) -> None:
    """Add a command for each benchmark. Its module is imported when it runs."""
    commands = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for name, text, add_options in BENCHMARKS:
        parser = commands.add_parser(name, allow_abbrev=False, help=text)
        add_options(parser)
        module = f"jaxllm.bench.{name.replace('-', '_')}"
        parser.set_defaults(run=lambda arguments, module=module: importlib.import_module(module).run(arguments))


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench tokenizer`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer (default: %(default)s)")
    _add(parser, "--workers", [1, 2, 4], "pool sizes to compare", nargs="+")
    _add(parser, "--num-prompts", 2000, "texts to tokenize")
    _add(parser, "--input-len", 256, "tokens of each")
    _add(parser, "--repeat", 5, "runs, alternating")
    _add_output_json(parser)


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench host`` takes."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and sizes (default: %(default)s)")
    _add(parser, "--num-seqs", [1, 32, 256, 1024], "running sequences to compare", nargs="+")
    _add(parser, "--steps", 400, "steps that count")
    _add(parser, "--warm-up", 200, "steps before, that do not", kind=not_negative)
    _add_switch(parser, "--stream", "deliver every token, not one output a request")
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        default="cpu",
        help="processor time of the engine's thread, which other programs disturb less, or wall-clock time "
        "(default: %(default)s)",
    )
    text = "launch a tiny model instead of nothing, so that uploads, launches and downloads are real"
    _add_switch(parser, "--real-launch", text)
    _add(parser, "--prefix-cache", None, "also compare N sequences with and without a prefix cache that nothing hits")
    _add(parser, "--step-ms", 10.0, "step of a device, whose share --prefix-cache gives", kind=milliseconds)
    _add_file(parser, "--trace", "write a Chrome trace of the largest number")
    parser.add_argument("--compare", choices=["vllm"], help="also time vLLM's scheduler, on the same requests")
    _add_peer_python(parser)
    _add_output_json(parser)


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench simulate`` takes."""
    _add(parser, "--num-prompts", 16, "requests of each workload")
    parser.add_argument(
        "--workloads", nargs="+", choices=_SIMULATED, default=list(_SIMULATED), metavar="NAME",
        help=f"of {', '.join(_SIMULATED)} (default: all)",
    )  # fmt: skip
    _add(parser, "--num-seqs", [4, 8, 16], "settings of max_num_seqs", nargs="+")
    _add(parser, "--num-batched-tokens", [64, 128, 256], "and of max_num_batched_tokens, one each", nargs="+")
    _add(parser, "--num-iters", 3, "runs of each workload, in turns with steps that are timed")
    _add_output_json(parser, "; parts of the grid that it has are kept, so that others may follow")
    add_engine_options(parser)


def add_throughput_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench throughput`` takes."""
    add_dataset_options(parser)
    _add_iterations(parser, num_iters=3, num_iters_warmup=1)
    _add(parser, "--sweep-num-prompts", None, "measure datasets of these sizes, one after another", kind=counts)
    text = "do not measure prefill and decode apart, which takes a second, shorter run in each iteration"
    _add_switch(parser, "--no-phases", text)
    _add_outputs(parser, plot="tokens per second against the number of requests")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--against",
        action="append",
        type=json_object,
        default=[],
        metavar="JSON",
        help="also an engine with these arguments, such as '{\"pipeline_parallel_size\": 2}', in turns with the "
        "other in one process (may be repeated)",
    )
    group.add_argument(
        "--compare",
        metavar="NAME,NAME,...",
        help="run these engines on the same requests, in turns: transformers, transformers-continuous, llama.cpp, "
        "vllm. All run in one dtype (default: bfloat16), greedily, to the same lengths, without detokenizing",
    )
    _add_peer_python(group)
    _add_file(group, "--gguf", "the model for llama.cpp (default: converted from the model's own file)", kind=Path)
    _add(group, "--threads", None, "cores for each engine (default: all)")
    text = "start every engine anew for each iteration, and count from its process's start to the last token"
    _add_switch(group, "--include-startup", text)
    add_engine_options(parser)


def add_latency_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench latency`` takes."""
    _add_lengths(parser, output_len=128)
    _add(parser, "--batch-size", 8, "requests in the batch")
    _add_iterations(parser, num_iters=30, num_iters_warmup=10)
    group = parser.add_argument_group("sweeps, which time the tokens after the first")
    _add(group, "--sweep-context", None, "with prompts of these lengths", kind=counts)
    _add(group, "--sweep-blocks", None, "with KV caches of these many blocks", kind=counts)
    _add_outputs(parser, plot="milliseconds per token against context or blocks")
    add_engine_options(parser)


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench lora`` takes."""
    _add_lengths(parser, output_len=32)
    _add(parser, "--batch-size", 32, "requests in the batch")
    _add_iterations(parser, num_iters=3, num_iters_warmup=1)
    _add_output_json(parser)
    add_engine_options(parser)


def add_images_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench images`` takes."""
    _add_lengths(parser, output_len=64)
    _add(parser, "--batch-size", 8, "texts in the batch")
    _add(parser, "--num-images", 4, "images beside them, each in a prompt of its own")
    _add(parser, "--image-size", 448, "pixels of a side")
    _add_iterations(parser, num_iters=3, num_iters_warmup=1)
    _add_output_json(parser)
    add_engine_options(parser)


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench profile`` takes."""
    _add(parser, "--batch-sizes", [1, 8, 32], "requests of each batch", kind=counts)
    _add_lengths(parser, output_len=21)
    _add_output_json(parser)
    add_engine_options(parser)


def add_startup_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench startup`` takes."""
    _add(parser, "--num-iters-cold", 3, "starts with an empty compile cache", kind=not_negative)
    _add(parser, "--num-iters-warmup", 1, "starts that fill the cache and do not count", kind=not_negative)
    _add(parser, "--num-iters-warm", 3, "starts with the cache filled", kind=not_negative)
    _add(parser, "--input-len", 32, "tokens of the prompt")
    _add_output_json(parser)
    add_engine_options(parser)


def add_serve_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench serve-trace`` takes."""
    add_dataset_options(parser)
    add_arrival_options(parser)
    _add_outputs(parser)
    add_engine_options(parser)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench serve`` takes."""
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="of the server, in place of host and port")
    server.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    _add(server, "--port", 8000, "its port")
    server.add_argument(
        "--backend",
        choices=("openai", "openai-chat"),
        default="openai",
        help="completions of token ids, or chats of texts (default: %(default)s)",
    )
    server.add_argument("--endpoint", metavar="PATH", help="of the call (default: the backend's)")
    server.add_argument("--served-model-name", metavar="NAME", help="of the model (default: what the server has)")
    server.add_argument("--extra-body", type=json_object, metavar="JSON", help="more parameters of every request")
    server.add_argument(
        "--header", nargs="+", default=[], metavar="NAME=VALUE", help="more headers; OPENAI_API_KEY has the key"
    )
    sampling = parser.add_argument_group("sampling", "of every request; nothing: greedily")
    for name in ("temperature", "top-p", "min-p", "frequency-penalty", "presence-penalty", "repetition-penalty"):
        sampling.add_argument(f"--{name}", type=float, metavar="X")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--ignore-eos", action="store_true", help="vLLM's switch; it is always so")
    add_dataset_options(parser)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer (default: %(default)s)")
    parser.add_argument("--tokenizer", default=argparse.SUPPRESS, metavar="TEXT", help="another one")
    _add(parser, "--seed", 0, "of prompts and arrivals", kind=not_negative)
    add_arrival_options(parser)
    _add(parser, "--num-warmups", 1, "requests before, that do not count", kind=not_negative)
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that are as fast as this, such as ttft:200 tpot:50",
    )
    text = "metrics to show, of ttft, tpot, itl and e2el"
    parser.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="NAME,...", help=text)
    parser.add_argument(
        "--metric-percentiles",
        type=shares,
        default=[99],
        metavar="N,N,...",
        help="percentiles to show, such as 50,99.9 (default: 99)",
    )
    _add_result_options(parser)
    parser.add_argument("--disable-tqdm", action="store_true", help="vLLM's switch; there is no bar")
    _add_output_json(parser)
    parser.set_defaults(config=None)


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results", "the JSON file that vLLM writes")
    _add_switch(group, "--save-result", "write it")
    _add_switch(group, "--save-detailed", "with a value a request")
    group.add_argument("--result-dir", metavar="FOLDER", help="where (default: here); it is made")
    group.add_argument(
        "--result-filename", metavar="NAME", help="(default: BACKEND-RATEqps[-concurrencyN]-MODEL-TIME.json)"
    )
    group.add_argument("--label", metavar="TEXT", help="in place of the backend in that name")
    group.add_argument("--metadata", nargs="+", default=[], metavar="NAME=VALUE", help="more of its keys")
    text = "draw the requests over time beside it, as .timeline.png"
    _add_switch(group, "--plot-timeline", text)
    _add_file(parser, "--plot", "draw the requests over time (.png, .svg, .pdf)")


def count_option(parser: argparse._ActionsContainer, name: str, text: str) -> None:
    """Add an option that takes a whole number above 0."""
    _add(parser, name, None, text)


def add_arrival_options(parser: argparse.ArgumentParser) -> None:
    """Add when requests come."""
    text = 'requests a second; inf: the "timestamp" seconds of a custom dataset\'s lines, else all at once'
    _add(parser, "--request-rate", float("inf"), text, kind=float)
    text = "1: requests come as a Poisson process; below: in bursts; above: evenly"
    _add(parser, "--burstiness", 1.0, text, kind=float)
    _add(parser, "--max-concurrency", None, "most requests at a time")


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add which requests to make. The seed is the engine's argument ``--seed``."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset-name",
        choices=DATASETS,
        default="random",
        help="random tokens; a ShareGPT JSON file; random tokens with ShareGPT's lengths; random tokens with shared "
        "beginnings; a JSONL file of prompts; or random tokens and images (default: %(default)s)",
    )
    _add_file(group, "--dataset-path", "of sharegpt and custom", kind=Path)
    _add(group, "--num-prompts", 1000, "requests")
    _add(group, "--input-len", None, "tokens of a random prompt (default: 1024)", "--random-input-len")
    text = "tokens to generate (default: what the dataset says; random and prefix_repetition: 128)"
    _add(group, "--output-len", None, text, "--random-output-len")
    _add(group, "--random-range-ratio", 0.0, "R: draw lengths from [n (1 - R), n (1 + R)]", kind=float)
    _add(group, "--random-prefix-len", 0, "tokens before these that all random prompts share", kind=not_negative)
    _add(group, "--prefix-repetition-prefix-len", 256, "tokens of a shared beginning", kind=not_negative)
    _add(group, "--prefix-repetition-suffix-len", 256, "tokens behind it")
    _add(group, "--prefix-repetition-num-prefixes", 10, "shared beginnings")
    _add(group, "--random-mm-base-items-per-request", 1, "images of a prompt of random-mm")
    text = "R: draw their number from [n (1 - R), n (1 + R)]"
    _add(group, "--random-mm-num-mm-items-range-ratio", 0.0, text, kind=float)
    text = "shares of their sizes, (height, width, 1)"
    _add(group, "--random-mm-bucket-config", BUCKETS, text, kind=str)


def add_perplexity_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``jaxllm bench perplexity`` takes."""
    _add_file(parser, "--text", "a text; default: Python's documentation of its own language", kind=Path)
    _add(parser, "--num-tokens", 50_000, "tokens of it, from its beginning")
    _add(parser, "--context", 1024, "tokens of a window; what is before it is not seen")
    sweeps = {
        "--sweep-dtype": "compare these values of --dtype, one engine after the other; the first of all is what others "
        "are compared with",
        "--sweep-quantization": "and these of --quantization; none: as the checkpoint is",
        "--sweep-kv-cache-dtype": "and these of --kv-cache-dtype",
        "--sweep-model": "and these models, quantized forms of the same; of a .gguf file its blocks",
    }
    for name, text in sweeps.items():
        parser.add_argument(name, type=lambda text: text.split(","), metavar="NAME,NAME,...", help=text)
    text = "and the model, a .gguf file, in every form that can be written of it (AWQ, GPTQ, NF4, GGUF's types by "
    text += "xllamacpp and gguf, ...): in this directory, where they stay"
    parser.add_argument("--every-form", type=Path, metavar="DIR", help=text)
    _add_switch(
        parser,
        "--weights-alone",
        "by the model's function of whole sequences, in float32 unless --dtype says: no engine",
    )
    _add_switch(parser, "--resume", "measure only forms that the file of --output-json has not")
    _add_output_json(parser)
    add_engine_options(parser)


BENCHMARKS = (
    Benchmark("tokenizer", "tokens tokenized per second, by the number of the pool's workers", add_tokenizer_options),
    Benchmark("host", "what a step costs the host, part by part", add_host_options),
    Benchmark("throughput", "requests and tokens per second of a batch; of other engines, too", add_throughput_options),
    Benchmark("latency", "seconds of one batch; decoding against context and cache size", add_latency_options),
    Benchmark("images", "images a second, and the speed of texts beside them", add_images_options),
    Benchmark("lora", "seconds of one batch without adapters and with several", add_lora_options),
    Benchmark("perplexity", "how well a text is foreseen, by forms of weights and KV cache", add_perplexity_options),
    Benchmark("profile", "milliseconds of compiled steps, by what they are for; on a CPU", add_profile_options),
    Benchmark("simulate", "how far the simulator is from what is measured", add_simulate_options),
    Benchmark("startup", "seconds from process start to the first token", add_startup_options),
    Benchmark("serve", "latencies of requests to a server of OpenAI's API", add_serve_options),
    Benchmark("serve-trace", "latencies of requests that come one by one, in this process", add_serve_trace_options),
)


def _add(
    parser: argparse._ActionsContainer,
    name: str,
    default: Any,
    text: str,
    *also: str,
    kind: Any = positive,
    **more: Any,
) -> None:
    """Add an option that takes numbers; a default of None is what the text says, or nothing.

    Args:
        also: other names of it.
    """
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    text = text if default is None else f"{text} (default: {shown})"
    metavar = "N,N,..." if kind is counts else "X" if kind in (float, milliseconds) else "N"
    parser.add_argument(name, *also, type=kind, default=default, metavar=metavar, help=text, **more)


def _add_lengths(parser: argparse.ArgumentParser, *, output_len: int) -> None:
    _add(parser, "--input-len", 32, "tokens of each prompt")
    _add(parser, "--output-len", output_len, "tokens to generate for each")


def _add_iterations(parser: argparse.ArgumentParser, *, num_iters: int, num_iters_warmup: int) -> None:
    _add(parser, "--num-iters", num_iters, "runs; medians count")
    _add(parser, "--num-iters-warmup", num_iters_warmup, "runs before, which do not count", kind=not_negative)


def _add_switch(parser: argparse._ActionsContainer, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", help=text)


def _add_file(parser: argparse._ActionsContainer, name: str, text: str, *, kind: Any = output_file) -> None:
    parser.add_argument(name, type=kind, metavar="FILE", help=text)


def _add_peer_python(parser: argparse._ActionsContainer) -> None:
    text = "the Python that an engine is installed for (may be repeated; default: this one)"
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help=text)


def _add_output_json(parser: argparse.ArgumentParser, more: str = "") -> None:
    _add_file(parser, "--output-json", f"write samples, medians, versions and machine there{more}")


def _add_outputs(parser: argparse.ArgumentParser, *, plot: str | None = None) -> None:
    _add_switch(parser, "--disable-detokenize", "generate token ids without text")
    _add_output_json(parser)
    if plot:
        _add_file(parser, "--plot", f"draw {plot} (.png, .svg, .pdf)")
