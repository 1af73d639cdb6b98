"""What each of the engine's arguments may be, and the form that its value is brought into."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import logits_processors
from jaxllm.api.pooler import pooler_config
from jaxllm.config.arguments import VLLM_ATTENTION_BACKENDS
from jaxllm.config.profiler import ProfilerConfig
from jaxllm.config.structured_outputs import ReasoningConfig, StructuredOutputsConfig, check_parser

#: `max_model_len` that asks for the longest one that fits into memory
FIT_TO_MEMORY = -1

#: more running requests than a device has memory for: token ids alone, of requests of 131,072 tokens, are 34 GB
MOST_SEQS = 2**16

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
ATTENTION_BACKENDS = {name: name for name in ("auto", "xla", "triton", "mosaic")}
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


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


def _max_num_seqs(name: str, value: Any) -> int:
    number = _at_least(1)(name, value)
    if number > MOST_SEQS:
        raise ValidationError(
            f"{name} must be at most {MOST_SEQS}, got {number}: every request that can run at once takes rows of its "
            "own in each step and on the device. Requests beyond it wait, however many there are; 256 to 1024 keep a "
            "large GPU busy."
        )
    return number


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


def _one_of(choices: Mapping[str, str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        choice = choices.get(value.strip().lower()) if isinstance(value, str) else None
        if choice is None:
            raise ValidationError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        return choice

    return check


def _attention_backend(name: str, value: Any) -> str:
    text = _text(name, value).strip()
    if text.upper() in VLLM_ATTENTION_BACKENDS:
        return "auto"
    if text.lower() not in ATTENTION_BACKENDS:
        raise ValidationError(
            f"{name} must be one of {', '.join(ATTENTION_BACKENDS)}, or a name of vLLM's own such as FLASH_ATTN, "
            f"FLASHINFER or TRITON_ATTN, which mean auto; got {value!r}."
        )
    return text.lower()


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


#: argument -> what checks its value: (name, value) -> the value in the field's type
CHECKS: dict[str, Callable[[str, Any], Any]] = {
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
    "max_num_seqs": _max_num_seqs,
    "max_num_batched_tokens": _at_least(1),
    "long_prefill_token_threshold": _at_least(0),
    "scheduling_policy": _one_of(POLICIES),
    "enable_chunked_prefill": checks.boolean,
    "enable_prefix_caching": checks.boolean,
    "async_scheduling": checks.boolean,
    "scheduler_reserve_full_isl": checks.boolean,
    "block_size": _block_size,
    "tensor_parallel_size": _at_least(1),
    "gpu_memory_utilization": _share,
    "kv_cache_memory_bytes": _at_least(1),
    # block 0 is trash, so one block would hold nothing
    "num_gpu_blocks_override": _at_least(2),
    "enforce_eager": checks.boolean,
    "num_decode_steps": _at_least(1),
    "deterministic": checks.boolean,
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
    "attention_backend": _attention_backend,
    "disable_log_stats": checks.boolean,
    "metrics_port": _port,
    "profiler_config": _fields_of(ProfilerConfig),
}
