"""From a checkpoint and its configuration to a runner: plan the memory, load, allocate, compile, in this order."""
# Trees of shapes have the form of `Params` and `State`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.config.cache import CacheConfig
from jaxllm.config.capacity import blocks_per_request, max_concurrency, max_tokens_per_request
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.errors import ValidationError
from jaxllm.models.decoder import DecoderConfig, Params
from jaxllm.models.model import base_prefix
from jaxllm.models.pooler import PoolingModel
from jaxllm.runner.buckets import make_buckets
from jaxllm.runner.memory import CPU_CACHE_LIMIT, GIB, MemoryPlan, device_memory, quantize_blocks
from jaxllm.runner.null import NullRunner
from jaxllm.runner.pooling_programs import PoolingPrograms
from jaxllm.runner.pooling_rows import PoolingRows
from jaxllm.runner.pooling_runner import PoolingRunner
from jaxllm.runner.pooling_step import PoolingState, PoolingStepConfig
from jaxllm.runner.programs import Programs
from jaxllm.runner.runner import Runner
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.runner.step import State, StepConfig
from jaxllm.weights.loader import shapes

if TYPE_CHECKING:
    from jaxllm.weights.checkpoint import Checkpoint

logger = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A runner, ready for its first step, and what the engine must know of it."""

    runner: Runner | PoolingRunner | NullRunner
    scheduler: SchedulerConfig
    cache: CacheConfig
    plan: MemoryPlan


def build_runner(config: RunnerConfig, checkpoint: Checkpoint, record: Callable[[str, float], None]) -> Built:
    """Build a runner.

    Args:
        record: told each start-up phase and its seconds.

    Raises:
        ValidationError: the KV cache does not hold one request; the text says what would.
        WeightsError: the checkpoint does not fit the model.
    """
    clock = _Clock(record)
    sources = config.sources()
    params = shapes(sources, jnp.dtype(config.dtype), config.sharding)
    config, programs, plan = plan_memory(config, params)
    clock.lap("plan")

    def load() -> Params | PoolingModel:
        return checkpoint.load(
            sources,
            jnp.dtype(config.dtype),
            config.sharding,
            prefix=base_prefix(config.model),
            seed=config.seed,
            progress=config.progress,
        )

    if config.device.platform != "cpu":
        # a GPU's compiler tries out products on the card, which must not be full
        programs.compile_all(config.progress)
        clock.lap("compile")
    weights = load()
    clock.lap("load weights")

    # allocation is asynchronous: the cache's pages are touched while the compiler works
    runner = _runner(config, weights, load, programs, plan.num_blocks)
    if config.device.platform == "cpu":
        programs.compile_all(config.progress)
        clock.lap("compile")
    runner.warm_up()
    clock.lap("warm up")
    return Built(runner=runner, scheduler=config.scheduler, cache=config.cache_config(plan.num_blocks), plan=plan)


def _runner(
    config: RunnerConfig,
    weights: Any,
    load: Callable[[], Any],
    programs: Programs | PoolingPrograms,
    num_blocks: int,
) -> Runner | PoolingRunner:
    if isinstance(programs, PoolingPrograms):
        rows = PoolingRows(
            config.scheduler.max_num_seqs, len(config.groups), config.table_width, config.model.hidden_size
        )
        return PoolingRunner(weights, load, programs, rows)
    state = config.state(num_blocks)
    assert isinstance(state, State)
    return Runner(
        weights,
        load,
        programs,
        state,
        num_groups=len(config.groups),
        table_width=config.table_width,
    )


def plan_memory(
    config: RunnerConfig, params: Params | PoolingModel
) -> tuple[RunnerConfig, Programs | PoolingPrograms, MemoryPlan]:
    """Compile the largest step for a guessed cache, ask the compiler what it needs, fit the cache into what is left.

    The temporaries do not depend on the cache's size (it is never copied), so one look is enough; the step is
    compiled again only when the guess was wrong. The configuration that is returned differs from the given one when
    `max_model_len` was fitted.
    """
    total, free = device_memory(config.device)
    weight_bytes = sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(params))
    state_bytes = config.state_bytes
    budget = min(total * config.gpu_memory_utilization, free) - weight_bytes - state_bytes
    num_blocks = _num_blocks(config, budget)
    if config.has_explicit_cache:  # known before anything is compiled
        _check_explicit_cache(config, num_blocks, total, weight_bytes + state_bytes)
        config = _fit(config, num_blocks, total, weight_bytes + state_bytes)
    while True:
        programs = _programs(config, params, num_blocks)
        activations = programs.activation_bytes()
        fitting = _num_blocks(config, budget - activations)
        if fitting >= num_blocks:
            break
        num_blocks = fitting
    fitted = _fit(config, num_blocks, total, weight_bytes + state_bytes + activations)
    if fitted is not config:
        return plan_memory(fitted, params)
    limits = config.scheduler
    cache = config.cache_config(num_blocks)
    concurrency = max_concurrency(cache, limits.max_model_len, max_chunk=limits.max_num_batched_tokens)
    plan = MemoryPlan(
        device=config.device.device_kind,
        total_bytes=total,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        state_bytes=state_bytes,
        kv_cache_bytes=num_blocks * config.block_bytes,
        kv_cache_limit=_binding_limit(config, num_blocks),
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        num_tokens=int(concurrency * limits.max_model_len),
        max_concurrency=concurrency,
    )
    return config, programs, plan


def _check_explicit_cache(config: RunnerConfig, num_blocks: int, total: int, other_bytes: int) -> None:
    """Refuse a cache that the user asked for and the device cannot hold."""
    most = min(_addressable_blocks(config), max(total - other_bytes, 0) // config.block_bytes)
    if num_blocks > most:
        raise ValidationError(
            f"a KV cache of {num_blocks} blocks ({num_blocks * config.block_bytes / GIB:.2f} GiB) does not fit: the "
            f"device has {total / GIB:.2f} GiB, of which {other_bytes / GIB:.2f} GiB are for weights and state. Set "
            f"num_gpu_blocks_override <= {most} or kv_cache_memory_bytes <= {most * config.block_bytes}."
        )


def _addressable_blocks(config: RunnerConfig) -> int:
    """Blocks whose rows (one key or value of one head) have int32 indices."""
    rows = config.layers_per_group * math.prod(config.page_shape[:-1])
    return (2**31 - 1) // rows


def _fit(config: RunnerConfig, num_blocks: int, total: int, other_bytes: int) -> RunnerConfig:
    """Make one request of max_model_len tokens fit into the cache.

    Args:
        total: bytes of the device.
        other_bytes: what is not the cache's.

    Returns:
        The configuration itself when one fits; otherwise, where that is allowed, one with a max_model_len that does.

    Raises:
        ValidationError: it does not fit; the text says what would.
    """
    limits = config.scheduler
    needed = _blocks_of_one(config)
    if num_blocks - 1 >= needed:
        return config
    longest = _longest(config, num_blocks)
    if not config.fit_max_model_len or longest < 1:
        share = ((needed + 1) * config.block_bytes + other_bytes) / total
        raise ValidationError(_too_small(config, num_blocks, needed, longest, share))
    logger.info(
        "Auto-fit max_model_len: reduced from %d to %d to fit in available KV cache memory",
        limits.max_model_len,
        longest,
    )
    return dataclasses.replace(config, scheduler=dataclasses.replace(limits, max_model_len=longest))


def _programs(config: RunnerConfig, params: Params | PoolingModel, num_blocks: int) -> Programs | PoolingPrograms:
    platform, state, limits = config.device.platform, config.state(num_blocks), config.scheduler
    # XLA's attention loops over what there is, so a step of single tokens costs nothing more in any bucket
    decode_only = config.backend.implementation not in ("xla", "reference")
    buckets = make_buckets(
        limits.max_num_batched_tokens, limits.max_num_seqs, eager=config.enforce_eager, decode_only=decode_only
    )
    if config.pooler is not None:
        assert isinstance(params, PoolingModel) and isinstance(state, PoolingState)
        return PoolingPrograms(
            PoolingStepConfig(model=config.model, groups=config.groups, pooler=config.pooler, backend=config.backend),
            buckets,
            config.table_width,
            params,
            state,
            limits.max_num_seqs,
            platform=platform,
            cache_dir=config.compile_cache,
        )
    assert isinstance(params, Params) and isinstance(state, State) and isinstance(config.model, DecoderConfig)
    return Programs(
        StepConfig(
            model=config.model,
            groups=config.groups,
            backend=config.backend,
            num_logprobs=config.num_logprobs,
            logprobs_mode=config.logprobs_mode,
            processors=config.processors,
            max_scored_tokens=config.scheduler.max_scored_tokens,
        ),
        buckets,
        config.table_width,
        params,
        state,
        platform=platform,
        eager=config.enforce_eager,
        cache_dir=config.compile_cache,
    )


def _num_blocks(config: RunnerConfig, budget: float) -> int:
    """Blocks for a cache of `budget` bytes, as far as the user left it to us; block 0 included."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return max(config.kv_cache_memory_bytes // config.block_bytes, 1)
    most, one = _most_blocks(config), 1 + _blocks_of_one(config)
    if config.device.platform == "cpu":
        budget = min(budget, max(CPU_CACHE_LIMIT, one * config.block_bytes))
    blocks = max(min(int(budget // config.block_bytes), _addressable_blocks(config)), 1)
    return most if blocks >= most else max(quantize_blocks(blocks), min(one, blocks))


def _blocks_of_one(config: RunnerConfig) -> int:
    """Blocks of one request of max_model_len tokens."""
    limits = config.scheduler
    return blocks_per_request(
        config.groups, config.block_size, limits.max_model_len, max_chunk=limits.max_num_batched_tokens
    )


def _most_blocks(config: RunnerConfig) -> int:
    """Blocks that as many of the longest requests as can run at once would fill; more are of no use."""
    if not config.model.causal:
        # a prompt is computed in one step; two steps are under way at once
        limits = config.scheduler
        full = -(-limits.max_num_batched_tokens // config.block_size) + limits.max_num_seqs
        return 1 + max(2 * full, _blocks_of_one(config)) * len(config.groups)
    return 1 + config.scheduler.max_num_seqs * _blocks_of_one(config)


def _binding_limit(config: RunnerConfig, num_blocks: int) -> int | None:
    """The CPU's limit on the cache, when it is what kept the cache from being larger."""
    if config.device.platform != "cpu" or config.has_explicit_cache or num_blocks >= _most_blocks(config):
        return None
    return CPU_CACHE_LIMIT if num_blocks * config.block_bytes <= CPU_CACHE_LIMIT else None


def _longest(config: RunnerConfig, num_blocks: int) -> int:
    """Most tokens of one request that a cache of `num_blocks` holds, at most max_model_len."""
    limits = config.scheduler
    return max_tokens_per_request(
        config.cache_config(num_blocks), max_chunk=limits.max_num_batched_tokens, limit=limits.max_model_len
    )


def _too_small(config: RunnerConfig, num_blocks: int, needed: int, longest: int, share: float) -> str:
    """`share`: of the device's memory that would be enough."""
    limits = config.scheduler
    need, have = (needed + 1) * config.block_bytes, num_blocks * config.block_bytes
    knob = f"gpu_memory_utilization to {math.ceil(share * 1000 + 1) / 1000:g}"
    if share > 1:
        knob = "the device's memory"
    if config.num_gpu_blocks_override is not None:
        knob = f"num_gpu_blocks_override to {needed + 1}"
    elif config.kv_cache_memory_bytes is not None:
        knob = f"kv_cache_memory_bytes to {need}"
    if longest < 1:
        return (
            "No available memory for the cache blocks. "
            f"One request of {limits.max_model_len} tokens needs {need / GIB:.2f} GiB of KV cache. Try increasing "
            f"{knob} when initializing the engine, or a smaller dtype, max_num_batched_tokens or max_num_seqs."
        )
    return (
        f"To serve at least one request with the model's max seq len ({limits.max_model_len}), {need / GIB:.3f} GiB KV "
        f"cache is needed, which is larger than the available KV cache memory ({have / GIB:.3f} GiB). Based on the "
        f"available memory, the estimated maximum model length is {longest}. Try increasing {knob} or decreasing "
        f"max_model_len to at most {longest}."
    )


class _Clock:
    def __init__(self, record: Callable[[str, float], None]):
        self._record, self._last = record, time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._record(phase, now - self._last)
        self._last = now
