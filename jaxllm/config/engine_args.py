"""The engine's arguments: vLLM's names, checked and brought into one form."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxllm import checks
from jaxllm.config.arguments import known_names, refuse, report_without_effect
from jaxllm.config.pooler import PoolerConfig, pooler_config
from jaxllm.config.structured_outputs import ReasoningConfig, StructuredOutputsConfig, check_parser
from jaxllm.errors import ValidationError
from jaxllm.logits_processor import LogitsProcessor, logits_processors

#: `max_model_len` that asks for the longest one that fits into memory
FIT_TO_MEMORY = -1

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
LOAD_FORMATS = {name: name for name in ("auto", "safetensors", "gguf", "orbax", "dummy", "null")}
POLICIES = {name: name for name in ("fcfs", "priority")}
LOGPROBS_MODES = {name: name for name in ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")}
RUNNERS = {name: name for name in ("auto", "generate", "pooling")}
CONVERSIONS = {name: name for name in ("auto", "none", "embed", "classify")}
TASKS = {name: name for name in ("auto", "generate", "embed", "embedding", "classify", "score")}
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What the engine is told, under vLLM's names and with its defaults, except where noted.

    Construction checks every value and normalises it to the type of its field: counts may come as strings ("1k" is
    1000, "8K" is 8192, "25.6k" is 25600), and None stands for the default.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range; the text names both.
    """

    #: a named model, a local directory, a .gguf file, or a hub id
    model: str | os.PathLike[str]
    #: as `model`, for the tokenizer alone; None: the model's
    tokenizer: str | os.PathLike[str] | None = None
    skip_tokenizer_init: bool = False
    #: threads that tokenize while the engine runs; 0: the caller's own
    tokenizer_pool_size: int = 1
    #: branch, tag or commit; hub ids only
    revision: str | None = None
    tokenizer_revision: str | None = None
    #: the hub's access token; True: the one that is logged in
    hf_token: str | bool | None = dataclasses.field(default=None, repr=False)
    #: entries of the model's config.json to replace
    hf_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: "auto", "float32", "bfloat16" or "float16", of weights, activations and KV cache
    dtype: str = "auto"
    #: "dummy": random weights; "null": no model at all, to measure the host (`jaxllm.runner.null`)
    load_format: str = "auto"
    #: of the dummy weights, and of requests without one of their own
    seed: int = 0
    #: prompt and output together, in tokens; None: the model's own; `FIT_TO_MEMORY` (-1, "auto"): what fits
    max_model_len: int | None = None
    #: None: the platform's, see `jaxllm.config.resolve`
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    #: 0: no limit
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    #: admit a prompt only when all of it fits into the free blocks
    scheduler_reserve_full_isl: bool = True
    #: tokens; a power of two in [8, 128]
    block_size: int = 16
    #: in (0, 1]
    gpu_memory_utilization: float = 0.9
    #: bytes of the KV cache, in place of `gpu_memory_utilization`
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    #: compile as little as possible
    enforce_eager: bool = False
    #: tokens between two outputs of a streamed request; a request may ask for more
    stream_interval: int = 1
    #: a dict of its fields will do
    structured_outputs_config: StructuredOutputsConfig = dataclasses.field(default_factory=StructuredOutputsConfig)
    #: a dict of its fields will do
    reasoning_config: ReasoningConfig = dataclasses.field(default_factory=ReasoningConfig)
    #: names the marks around the model's reasoning, as in the two configurations
    reasoning_parser: str = ""
    #: most `logprobs` that a request may ask for; -1: the vocabulary
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    #: jax functions ``(logits, state) -> logits`` that run inside every step, or ``module:name`` of them; see
    #: `jaxllm.LogitsProcessor`
    logits_processors: tuple[LogitsProcessor, ...] = ()
    #: where sampling defaults come from: "auto" (the model), "vllm" (nowhere), or a directory
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: a Jinja template or its file, in place of the model's
    chat_template: str | None = None
    #: "auto", "generate" or "pooling": whether the engine generates text or makes vectors and classes
    runner: str = "auto"
    #: how a model is made to pool: "auto", "none", "embed" or "classify"
    convert: str = "auto"
    #: older form of `runner` and `convert`: "auto", "generate", "embed", "classify" or "score"
    task: str | None = None
    pooler_config: PoolerConfig | None = None
    #: older name of `pooler_config`
    override_pooler_config: PoolerConfig | None = None
    #: "auto", "cpu" or "gpu"
    device: str = "auto"
    #: False logs a line of statistics every 10 seconds while requests run; metrics are collected in any case
    disable_log_stats: bool = True
    #: serve Prometheus' metrics on this port of the loopback interface, 0 on any free one; None: nowhere
    metrics_port: int | None = None
    #: where `start_profile` writes: {"torch_profiler_dir": directory}
    profiler_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "model":
                value = _default(field)
            if value is not None or field.name == "model":
                value = _CHECKS[field.name](field.name, value)
            object.__setattr__(self, field.name, value)
        if self.override_pooler_config is not None:
            if self.pooler_config is not None:
                raise ValidationError("pooler_config and override_pooler_config are two names of one thing; set one.")
            object.__setattr__(self, "pooler_config", self.override_pooler_config)
            object.__setattr__(self, "override_pooler_config", None)
        if (
            self.max_num_batched_tokens is not None
            and self.max_num_seqs is not None
            and self.max_num_batched_tokens < self.max_num_seqs
        ):
            raise ValidationError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or equal to "
                f"max_num_seqs ({self.max_num_seqs}): a step gives every running request at least one token."
            )

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every argument to a parser, as vLLM's scripts do; ``LLM(**vars(parser.parse_args()))`` takes them."""
        from jaxllm.config.command_line import add_engine_arguments

        parser.add_argument("--model", help="a named model, a local directory, a .gguf file, or a hub id")
        add_engine_arguments(parser, defaults=True)
        return parser

    @classmethod
    def from_cli_args(cls, arguments: argparse.Namespace) -> EngineArgs:
        """The arguments that a parser with `add_cli_args` has read."""
        given = {name: value for name, value in vars(arguments).items() if name in known_names() | argument_names()}
        return engine_args(given.pop("model"), **given)


def argument_names() -> set[str]:
    """The arguments that the engine acts on."""
    return {field.name for field in dataclasses.fields(EngineArgs)}


def engine_args(model: str | os.PathLike[str], **arguments: Any) -> EngineArgs:
    """`EngineArgs` from vLLM's arguments. Those that have no effect here are named in one line of the log.

    Raises:
        TypeError: an argument that does not exist.
        ValidationError: a value that cannot be used, or an argument of a capability that jaxllm does not have yet.
    """
    fields = argument_names()
    known = fields | known_names()
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_").lower(), sorted(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}.{hint}")
    refuse(arguments)
    result = EngineArgs(model=model, **{name: value for name, value in arguments.items() if name in fields})
    report_without_effect(arguments)
    return result


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _count(name: str, value: Any) -> int:
    """A whole number, or a string with one: 1k is 1000 and 1K is 1024 (likewise m, g)."""
    if not isinstance(value, str):
        return checks.integer(name, value)
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
    # exact: in floats, 1.001k and its like would not be whole
    number = Fraction(match[1]) * _MULTIPLES[match[2]] if match else Fraction(1, 2)
    if number.denominator != 1:
        raise ValidationError(f"{name} must be a whole number such as 8192, '8K' or '25.6k', got {value!r}.")
    return int(number)


def _at_least(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        number = _count(name, value)
        if number < least:
            raise ValidationError(f"{name} must be at least {least}, got {number}.")
        return number

    return check


def _max_model_len(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return FIT_TO_MEMORY
    number = _count(name, value)
    if number < 1 and number != FIT_TO_MEMORY:
        raise ValidationError(f"{name} must be at least 1, or -1 (or 'auto') for what fits in memory, got {number}.")
    return number


def _block_size(name: str, value: Any) -> int:
    number = _count(name, value)
    if number not in (8, 16, 32, 64, 128):
        raise ValidationError(f"{name} must be 8, 16, 32, 64 or 128 tokens, got {number}.")
    return number


def _share(name: str, value: Any) -> float:
    number = checks.real(name, value)
    if not 0 < number <= 1:
        raise ValidationError(f"{name} must be in (0, 1], got {number}.")
    return number


def _max_logprobs(name: str, value: Any) -> int:
    number = checks.integer(name, value)
    if number < -1:
        raise ValidationError(f"{name} must be at least 0, or -1 for the whole vocabulary, got {number}.")
    return number


def _seed(name: str, value: Any) -> int:
    number = checks.integer(name, value)
    if not -(2**63) <= number < 2**64:
        raise ValidationError(f"{name} must fit 64 bits, got {number}.")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValidationError(f"{name} must be a non-empty string, got {value!r} of type {type(value).__name__}.")
    return value


def _place(name: str, value: Any) -> str | os.PathLike[str]:
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValidationError(f"{name} must be a name or a path, got {value!r} of type {type(value).__name__}.")
    return value


def _path_text(name: str, value: Any) -> str:
    return os.fspath(_place(name, value))


def _token(name: str, value: Any) -> str | bool:
    return value if isinstance(value, bool) else _text(name, value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValidationError(f"{name} must be a dict with string keys, got {value!r} of type {type(value).__name__}.")
    return dict(value)


def _port(name: str, value: Any) -> int:
    number = checks.integer(name, value)
    if not 0 <= number < 2**16:
        raise ValidationError(f"{name} must be a TCP port, 0 (any free one) to 65535, got {number}.")
    return number


def _profiler_config(name: str, value: Any) -> dict[str, Any]:
    """vLLM's; the torch profiler's name stands for the only profiler that there is, JAX's."""
    config = _mapping(name, value)
    for key, setting in config.items():
        if key == "profiler":
            _one_of({choice: choice for choice in ("torch", "jax")})(f"{name}['profiler']", setting)
        elif key == "torch_profiler_dir":
            config[key] = _path_text(f"{name}['torch_profiler_dir']", setting)
        else:
            raise ValidationError(
                f"{name} takes 'torch_profiler_dir' (where traces go) and 'profiler' ('jax', or 'torch', which means "
                f"the same here); got {key!r}."
            )
    return config


def _one_of(choices: Mapping[str, str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        choice = choices.get(value.strip().lower()) if isinstance(value, str) else None
        if choice is None:
            raise ValidationError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        return choice

    return check


def _fields_of(kind: type) -> Callable[[str, Any], Any]:
    """An instance of a dataclass, or a mapping with its fields."""
    names = [field.name for field in dataclasses.fields(kind)]

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kind):
            return value
        given = _mapping(name, value)
        # what asks for nothing may be there as well
        wrong = next((key for key in given if key not in names and given[key]), None)
        if wrong is not None:
            raise ValidationError(f"{name} has no field {wrong!r}; its fields are {', '.join(names)}.")
        return kind(**{key: given[key] for key in names if given.get(key) is not None})

    return check


def _parser(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValidationError(f"{name} must be a string, got {value!r} of type {type(value).__name__}.")
    check_parser(value)
    return value


def _dtype(name: str, value: Any) -> str:
    # numpy, jax.numpy and torch each print theirs in another way; none of them is imported here
    if not isinstance(value, str):
        value = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).removeprefix("torch.")
    return _one_of(DTYPES)(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _place,
    "tokenizer": _place,
    "skip_tokenizer_init": checks.boolean,
    "tokenizer_pool_size": _at_least(0),
    "revision": _text,
    "tokenizer_revision": _text,
    "hf_token": _token,
    "hf_overrides": _mapping,
    "dtype": _dtype,
    "load_format": _one_of(LOAD_FORMATS),
    "seed": _seed,
    "max_model_len": _max_model_len,
    "max_num_seqs": _at_least(1),
    "max_num_batched_tokens": _at_least(1),
    "long_prefill_token_threshold": _at_least(0),
    "scheduling_policy": _one_of(POLICIES),
    "enable_chunked_prefill": checks.boolean,
    "enable_prefix_caching": checks.boolean,
    "async_scheduling": checks.boolean,
    "scheduler_reserve_full_isl": checks.boolean,
    "block_size": _block_size,
    "gpu_memory_utilization": _share,
    "kv_cache_memory_bytes": _at_least(1),
    # block 0 is trash, so one block would hold nothing
    "num_gpu_blocks_override": _at_least(2),
    "enforce_eager": checks.boolean,
    "stream_interval": _at_least(1),
    "structured_outputs_config": _fields_of(StructuredOutputsConfig),
    "reasoning_config": _fields_of(ReasoningConfig),
    "reasoning_parser": _parser,
    "max_logprobs": _max_logprobs,
    "logits_processors": logits_processors,
    "logprobs_mode": _one_of(LOGPROBS_MODES),
    "generation_config": _path_text,
    "override_generation_config": _mapping,
    "chat_template": _path_text,
    "runner": _one_of(RUNNERS),
    "convert": _one_of(CONVERSIONS),
    "task": _one_of(TASKS),
    "pooler_config": pooler_config,
    "override_pooler_config": pooler_config,
    "device": _one_of(DEVICES),
    "disable_log_stats": checks.boolean,
    "metrics_port": _port,
    "profiler_config": _profiler_config,
}
