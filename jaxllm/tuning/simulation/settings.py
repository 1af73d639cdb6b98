"""Other settings of an engine, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.capacity import blocks_per_request, max_tokens_per_request
from jaxllm.config.resolve import CPU_DECODE_STEPS_SEQS, GPU_DECODE_STEPS_SEQS
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.observe.engine_settings import EngineSettings

_GIB = 2**30
#: arguments that decide how many blocks there are
_SIZES = ("gpu_memory_utilization", "kv_cache_memory_bytes", "block_size", "kv_cache_dtype")
#: those that change nothing but what the scheduler does, and which of the programs run
_LIMITS = (
    "max_num_seqs",
    "max_num_active_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "long_prefill_token_threshold",
    "num_decode_steps",
    "num_speculative_tokens",
)
_SWITCHES = (
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "async_scheduling",
    "enforce_eager",
    "long_prefill_token_threshold_adaptive",
)


def changed(settings: EngineSettings, changes: Mapping[str, Any]) -> EngineSettings:
    """The settings of an engine that had been started with other arguments. Blocks are as many as fit where the memory
    that they have is another, or their size; what steps need beside weights and blocks stays as it is.

    Args:
        changes: engine arguments, by their names.

    Raises:
        ValidationError: nothing is known of such an argument, or the memory does not hold two blocks.
    """
    given = dict(changes)
    resized = {name: given.pop(name) for name in _SIZES if name in given}
    blocks = given.pop("num_gpu_blocks_override", None)
    if unknown := sorted(set(given) - {*_LIMITS, *_SWITCHES}):
        raise ValidationError(f"{unknown[0]} is not simulated: leave it out.")
    for name, value in given.items():
        if name in _LIMITS and (not isinstance(value, int) or value < 0):
            raise ValidationError(f"{name} must be a whole number to be simulated, got {value!r}.")
    found = dataclasses.replace(settings, **given)
    if resized:
        found = _resized(found, **resized)
    if blocks is not None:
        found = dataclasses.replace(found, num_blocks=blocks, sized_by="num_gpu_blocks_override")
    return found


def _resized(
    settings: EngineSettings,
    *,
    gpu_memory_utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    block_size: int | None = None,
    kv_cache_dtype: str | None = None,
) -> EngineSettings:
    size, blocks, tokens = settings.block_bytes, settings.num_blocks, settings.block_size
    if not (size and blocks and tokens):
        raise ValidationError("how large a block is is not known: take a trace of jaxllm, which says it.")
    memory = size * blocks
    if kv_cache_dtype is not None:
        if kv_cache_dtype != "auto" and settings.int8_block_bytes is None:
            raise ValidationError(f"kv_cache_dtype={kv_cache_dtype!r}: keys and values have no smaller form here.")
        # every form of a byte takes as much
        size = size if kv_cache_dtype == "auto" or settings.int8_block_bytes is None else settings.int8_block_bytes
    if block_size is not None:
        size = size * block_size // tokens
    if kv_cache_memory_bytes is not None:
        memory = kv_cache_memory_bytes
    elif gpu_memory_utilization is not None:
        if settings.sized_by != "gpu_memory_utilization" or not settings.total_bytes:
            raise ValidationError(
                f"gpu_memory_utilization has no effect on this engine, whose cache {settings.sized_by} decides. Change "
                "num_gpu_blocks_override or kv_cache_memory_bytes."
            )
        taken = (settings.weight_bytes or 0) + (settings.other_bytes or 0)
        memory = int(gpu_memory_utilization * settings.total_bytes) - taken
    if settings.sized_by == "num_gpu_blocks_override" and kv_cache_memory_bytes is None:
        memory = size * blocks
    if memory // size < 2:
        raise ValidationError(
            f"{memory / _GIB:.3f} GiB are left for the KV cache, which hold no block of {size:,} bytes: raise "
            "gpu_memory_utilization."
        )
    return dataclasses.replace(
        settings,
        block_bytes=size,
        num_blocks=memory // size,
        block_size=block_size or tokens,
        gpu_memory_utilization=gpu_memory_utilization or settings.gpu_memory_utilization,
    )


def configs(settings: EngineSettings) -> tuple[SchedulerConfig, CacheConfig]:
    """Those of the scheduler and of the cache.

    Raises:
        ValidationError: the settings lack what a scheduler needs, or ask for what is not simulated.
    """
    needed: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks")
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValidationError(f"a simulation needs {', '.join(missing)}: take a trace of jaxllm, which says it.")
    if settings.num_speculative_tokens or settings.pipeline_parallel_size > 1:
        what = "speculative_config" if settings.num_speculative_tokens else "pipeline_parallel_size"
        raise ValidationError(f"{what} is not simulated: leave it out, or take a trace without it.")
    if settings.kv_offloading_size:
        raise ValidationError("kv_offloading_size is not simulated: leave it out, or take a trace without it.")
    seqs, budget = needed["max_num_seqs"], needed["max_num_batched_tokens"]
    if budget < seqs:
        raise ValidationError(f"max_num_batched_tokens={budget} is less than max_num_seqs={seqs}, as in no engine.")
    most = CPU_DECODE_STEPS_SEQS if settings.platform == "cpu" else GPU_DECODE_STEPS_SEQS
    scheduler = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=needed["max_model_len"],
        max_num_active_seqs=settings.max_num_active_seqs,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        async_scheduling=settings.async_scheduling,
        num_decode_steps=settings.num_decode_steps,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=settings.long_prefill_token_threshold_adaptive,
        max_decode_steps_seqs=min(most, seqs) if settings.num_decode_steps > 1 else 0,
    )
    cache = CacheConfig(
        block_size=needed["block_size"],
        num_blocks=needed["num_blocks"],
        groups=tuple(KVCacheGroup(layers=(0,), sliding_window=window) for window in settings.windows),
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    length = scheduler.max_model_len
    of_one = blocks_per_request(cache.groups, cache.block_size, length, max_chunk=budget)
    if of_one >= cache.num_blocks >= 2:  # fewer are no cache
        fit = max_tokens_per_request(cache, max_chunk=budget, limit=length)
        raise ValidationError(
            f"{cache.num_blocks} blocks of {cache.block_size} tokens, of which block 0 is not used, hold no request of "
            f"max_model_len={length}, so no engine starts with them. Take {of_one + 1} blocks, or set max_model_len to "
            f"at most {fit}."
        )
    return scheduler, cache
