"""The engine's arguments as options of a command line, in kebab-case."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.config.arguments import ALIASES, NEVER, NO_EFFECT, NOT_YET
from jaxllm.config.engine_args import EngineArgs

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def count(text: str) -> int:
    """A whole number; as in vLLM, 1k is 1000 and 1K is 1024 (likewise m, g), and 25.6k is 25600."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    number = float(match[1]) * _MULTIPLES[match[2]] if match else 0.5
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1000, 1k and 25.6k are)")
    return int(number)


def _length(text: str) -> int | str:
    return "auto" if text.strip().lower() == "auto" else count(text)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"rope_theta\": 10000}}'")
    return value


def _value(text: str) -> Any:
    """For vLLM's arguments without a type here: JSON where it is JSON, text elsewhere."""
    try:
        return json.loads(text)
    except ValueError:
        return text


#: engine argument -> help; the types are those of `EngineArgs`
ENGINE_HELP: dict[str, str] = {
    "tokenizer": "tokenizer's directory or hub id, when it is not the model's",
    "skip_tokenizer_init": "run without a tokenizer: prompts are token ids",
    "dtype": "of weights and activations: auto, float32, bfloat16, float16",
    "load_format": "auto, safetensors, gguf, orbax, dummy (random weights), null (no model: measures the host)",
    "tokenizer_pool_size": "threads that tokenize",
    "revision": "branch, tag or commit of a hub model",
    "tokenizer_revision": "as --revision, of the tokenizer",
    "hf_token": "the hub's access token",
    "hf_overrides": "entries of config.json to replace",
    "seed": "the engine's seed, from which every request gets its own",
    "chat_template": "a Jinja template, or its file, in place of the model's",
    "generation_config": "where sampling defaults come from: auto (the model), vllm (nowhere), or a directory",
    "override_generation_config": "entries of generation_config.json to replace",
    "max_model_len": "longest prompt and output together, in tokens; auto: what fits into memory",
    "max_num_seqs": "most requests in one step",
    "max_num_batched_tokens": "most tokens in one step",
    "gpu_memory_utilization": "share of the device's memory that may be used, in (0, 1]",
    "kv_cache_memory_bytes": "size of the KV cache, in place of gpu_memory_utilization",
    "num_gpu_blocks_override": "number of KV-cache blocks, in place of planning them",
    "block_size": "tokens in a KV-cache block: 8, 16, 32, 64 or 128; 64 on a CPU and 16 on a GPU unless given",
    "long_prefill_token_threshold": "most prompt tokens of one request in a step; 0: no limit",
    "scheduling_policy": "fcfs or priority",
    "scheduler_reserve_full_isl": "admit a prompt only when all of it fits into the free blocks",
    "enable_prefix_caching": "share the KV cache of equal prompt beginnings",
    "enable_chunked_prefill": "split long prompts over several steps",
    "async_scheduling": "schedule a step while the one before runs",
    "enforce_eager": "compile as little as possible: starts sooner, runs slower",
    "deterministic": "the same bits for a request, whatever else runs; on a CPU",
    "max_logprobs": "most log-probabilities a request may ask for; -1: the vocabulary",
    "logprobs_mode": "raw_logprobs, raw_logits, processed_logprobs or processed_logits",
    "device": "auto, cpu or gpu",
    "tensor_parallel_size": "devices that share the model; a CPU becomes as many",
    "attention_backend": "what attention is compiled to: auto, xla, triton or mosaic",
    "disable_log_stats": "do not log a line of statistics every ten seconds",
    "metrics_port": "serve Prometheus metrics at this port of the local machine",
    "logits_processors": "JSON list of module:name of functions that change logits",
    "runner": "auto, generate, or pooling (embeddings, classes, scores)",
    "convert": "how a model is made to pool: auto, none, embed or classify",
    "task": "older form of --runner and --convert: generate, embed, classify or score",
    "pooler_config": "how tokens are pooled, as in vLLM",
    "override_pooler_config": "older name of --pooler-config",
    "structured_outputs_config": "how grammars are read, as in vLLM",
    "reasoning_config": "the marks of reasoning: reasoning_start_str and reasoning_end_str",
    "reasoning_parser": "whose marks of reasoning: a model family, as in vLLM",
    "num_decode_steps": "most decode steps of one launch, where nobody waits and nothing is streamed; 1: off",
    "stream_interval": "tokens between two outputs of a streamed request",
    "profiler_config": "where profiles go, as in vLLM",
}

_SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp"}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser that takes ``--max_num_seqs`` for ``--max-num-seqs``, as vLLM's does."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(with_hyphens(sys.argv[1:] if args is None else args), namespace)


def add_engine_arguments(parser: argparse._ActionsContainer, *, defaults: bool = False) -> None:
    """Add the engine's arguments, except the model. vLLM's other arguments are taken as well, without being listed: the
    engine says what becomes of them.

    Args:
        defaults: whether an argument that is not given has its default; otherwise it is not there at all.
    """
    group = parser.add_argument_group("engine options")
    fields = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    for name, kind in engine_types().items():
        default = fields[name] if defaults and fields[name] is not dataclasses.MISSING else argparse.SUPPRESS
        add_option(group, name, kind, ENGINE_HELP.get(name, ""), default=default, short=_SHORT.get(name))
    for name, values in unlisted().items():
        kind = None if values and all(isinstance(value, bool) for value in values) else _value
        add_option(group, name, kind, argparse.SUPPRESS, short=_SHORT.get(name))


def engine_types() -> dict[str, Callable[[str], Any] | None]:
    """Engine argument -> what reads its text; None: a switch. `model` is an option of its own."""
    readers: dict[type, Callable[[str], Any]] = {int: count, float: float, dict: _mapping, str: str, os.PathLike: str}
    found: dict[str, Callable[[str], Any] | None] = {}
    for name, hint in typing.get_type_hints(EngineArgs).items():
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        kinds = [typing.get_origin(member) or member for member in members if member is not type(None)]
        if kinds == [bool]:
            found[name] = None
        else:
            # a type that says more than text is tried first; JSON is for what is neither
            found[name] = next((reader for kind, reader in readers.items() if kind in kinds), _value)
    del found["model"]
    found["max_model_len"] = _length
    return found


def unlisted() -> dict[str, tuple[Any, ...]]:
    """vLLM's arguments that are no fields of `EngineArgs` -> values that ask for nothing, which tell their type."""
    found = {name: values for names in NOT_YET.values() for name, values in names.items()}
    found.update({name: never.accepted for name, never in NEVER.items()})
    found.update({name: no_effect.quiet for name, no_effect in NO_EFFECT.items()})
    found.update(dict.fromkeys(ALIASES, (1,)))
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    return {name: values for name, values in found.items() if name not in fields}


def add_option(
    group: argparse._ArgumentGroup,
    name: str,
    kind: Any,
    text: str,
    *,
    default: Any = argparse.SUPPRESS,
    short: str | None = None,
) -> None:
    flags = [*([short] if short else []), f"--{name.replace('_', '-')}"]
    if kind is None:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=text, dest=name)
        return
    shown = "" if default is argparse.SUPPRESS else f" (default: {default})"
    metavar = "JSON" if kind is _mapping else "TEXT" if kind is str else "N"
    help_text = text if text is argparse.SUPPRESS else text + shown
    group.add_argument(*flags, type=kind, default=default, help=help_text, metavar=metavar, dest=name)


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
