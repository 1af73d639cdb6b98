"""The options that the commands share: vLLM's engine arguments and sampling parameters, in kebab-case."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.llm import LLM
    from jaxllm.sampling_params import SamplingParams

DEFAULT_MODEL = "smollm2-135m-instruct"
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def count(text: str) -> int:
    """A whole number; as in vLLM, 1k is 1000 and 1K is 1024 (likewise m, g), and 25.6k is 25600."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    number = float(match[1]) * _MULTIPLES[match[2]] if match else 0.5
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1000, 1k and 25.6k are)")
    return int(number)


#: name, type (None: a switch with a --no- form), help
_ENGINE: tuple[tuple[str, Any, str], ...] = (
    ("tokenizer", str, "tokenizer's directory or hub id, when it is not the model's"),
    ("dtype", str, "of weights and activations: auto, float32, bfloat16, float16"),
    ("load_format", str, "auto, safetensors, gguf, orbax, dummy"),
    ("revision", str, "branch, tag or commit of a hub model"),
    ("chat_template", str, "a Jinja template, or its file, in place of the model's"),
    ("max_model_len", count, "longest prompt and output together, in tokens"),
    ("max_num_seqs", count, "most requests in one step"),
    ("max_num_batched_tokens", count, "most tokens in one step"),
    ("gpu_memory_utilization", float, "share of the device's memory that may be used, in (0, 1]"),
    ("kv_cache_memory_bytes", count, "size of the KV cache, in place of gpu_memory_utilization"),
    ("num_gpu_blocks_override", count, "number of KV-cache blocks, in place of planning them"),
    ("block_size", count, "tokens in a KV-cache block"),
    ("long_prefill_token_threshold", count, "most prompt tokens of one request in a step; 0: no limit"),
    ("scheduling_policy", str, "fcfs or priority"),
    ("enable_prefix_caching", None, "share the KV cache of equal prompt beginnings"),
    ("enable_chunked_prefill", None, "split long prompts over several steps"),
    ("async_scheduling", None, "schedule a step while the one before runs"),
    ("enforce_eager", None, "compile as little as possible: starts sooner, runs slower"),
)

_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", count, "most tokens to generate"),
    ("min_tokens", count, "fewest tokens to generate"),
    ("temperature", float, "randomness; 0: always the likeliest token"),
    ("top_p", float, "sample among the likeliest tokens that make up this share"),
    ("top_k", int, "sample among this many tokens"),
    ("min_p", float, "leave out tokens less likely than this share of the likeliest one"),
    ("repetition_penalty", float, "above 1: discourage tokens of prompt and output"),
    ("presence_penalty", float, "above 0: discourage tokens generated before"),
    ("frequency_penalty", float, "above 0: discourage tokens by how often they were generated"),
    ("seed", int, "make sampling repeatable"),
    ("ignore_eos", None, "do not stop at the end-of-sequence token"),
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and the engine's arguments; those not given are left to the engine's own defaults."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a named model, a local directory, a .gguf file, or a hub id (default: %(default)s)",
    )
    _add(parser.add_argument_group("engine options"), _ENGINE)


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the sampling parameters. `defaults` are this command's own, where they differ from `SamplingParams`."""
    group = parser.add_argument_group("sampling options")
    _add(group, _SAMPLING, defaults)
    group.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help="end at this text (may be repeated)"
    )


def _add(
    group: argparse._ArgumentGroup, options: tuple[tuple[str, Any, str], ...], defaults: dict[str, Any] | None = None
) -> None:
    for name, kind, text in options:
        default = (defaults or {}).get(name, argparse.SUPPRESS)
        shown = "" if default is argparse.SUPPRESS else f" (default: {default})"
        flag = f"--{name.replace('_', '-')}"
        if kind is None:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            group.add_argument(
                flag, type=kind, default=default, help=text + shown, metavar="TEXT" if kind is str else "N"
            )


def build_llm(arguments: argparse.Namespace, **defaults: Any) -> LLM:
    """The engine that the command line describes. `defaults` are this command's own, for what was not given."""
    from jaxllm.llm import LLM

    return LLM(arguments.model, **{**defaults, **_given(arguments, _ENGINE)})


def build_sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that the command line describes. Raises `ValidationError` for values out of range."""
    from jaxllm.sampling_params import SamplingParams

    return SamplingParams(**_given(arguments, (*_SAMPLING, ("stop", str, ""))))


def _given(arguments: argparse.Namespace, options: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name, _, _ in options if hasattr(arguments, name)}


def with_hyphens(argv: Sequence[str]) -> list[str]:
    """`argv` with ``--max_num_seqs`` spelled ``--max-num-seqs``, as vLLM takes both; values keep their underscores."""
    words = []
    for position, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[position:]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        words.append(word)
    return words
