"""Fitting the KV cache into what weights, state and activations leave of a device's memory.

One function plans for devices that are there and for devices that are not: how many bytes the compiled steps need is
asked of whoever knows it, a compiler or an estimate.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

from jaxllm.api.errors import ValidationError
from jaxllm.config.capacity import blocks_per_request, max_concurrency, max_tokens_per_request
from jaxllm.runner.capacities import block_capacity
from jaxllm.runner.device_state import encoder_bytes, state_bytes
from jaxllm.runner.memory.plan import CPU_CACHE_LIMIT, GIB, MemoryPlan, quantize_blocks
from jaxllm.runner.runner_config import RunnerConfig

logger = logging.getLogger("jaxllm")

#: bytes that a CPU has beside the weights where they are read while programs are compiled: the plan of a model that
#: takes nearly all of it may refuse it, and the compiler wants some hundred megabytes
ROOM_BESIDE = 2 * GIB

#: (configuration, blocks of the cache) -> bytes of temporaries and outputs of the largest step, of each pipeline stage
Activations = Callable[[RunnerConfig, int], Sequence[int]]


class DoesNotFitError(ValidationError):
    """A device does not hold the model and one request of max_model_len tokens; the text says what would help.

    Attributes:
        plan: what there would be. Its activations are 0 where nothing was compiled.
        problem: the text without what would help.
        longest: tokens of the longest request that the cache would hold; 0: none.
        share: of the device's memory that would be enough, above 1 where all of it is not.
        enough_blocks: of a cache that holds one request, or the most that the device holds.
    """

    def __init__(self, problem: str, advice: str, plan: MemoryPlan, *, longest: int, share: float, enough_blocks: int):
        super().__init__(f"{problem} {advice}")
        self.problem, self.plan = problem, plan
        self.longest, self.share, self.enough_blocks = longest, share, enough_blocks


def plan_memory(
    config: RunnerConfig, activations: Activations, *, measure_first: bool = False
) -> tuple[RunnerConfig, MemoryPlan]:
    """Ask what the largest step needs with a guessed cache, fit the cache into what is left.

    The temporaries do not depend on the cache's size (it is never copied), so one look is enough; there is another only
    when the guess was wrong. The last look is at the plan that is returned.

    Args:
        measure_first: know the activations even of a plan that could be refused without them.

    Returns:
        The configuration, which differs from the given one when `max_model_len` was fitted, and its plan; of a
        pipeline, that of the stage with the least room.

    Raises:
        DoesNotFitError: the KV cache does not hold one request.
    """
    stages = config.stages
    budgets = [_usable_bytes(stage) - stage.weight_bytes - state_bytes(stage) for stage in stages]
    num_blocks = min(map(_num_blocks, stages, budgets))
    if config.has_explicit_cache and not measure_first:  # known before anything is compiled
        for stage in stages:
            _check_explicit_cache(stage, num_blocks, 0)
        config = _fit(config, max(stages, key=lambda stage: stage.block_bytes), num_blocks, 0)
        stages = config.stages
    while True:
        needed = [own + stage.staged_bytes for own, stage in zip(activations(config, num_blocks), stages, strict=True)]
        left = [budget - own for budget, own in zip(budgets, needed, strict=True)]
        fitting = min(map(_num_blocks, stages, left))
        if fitting >= num_blocks:
            break
        num_blocks = fitting
    if config.has_explicit_cache:
        for stage, own in zip(stages, needed, strict=True):
            _check_explicit_cache(stage, num_blocks, own)
    unused = [rest - num_blocks * stage.block_bytes for stage, rest in zip(stages, left, strict=True)]
    fullest = unused.index(min(unused))
    fitted = _fit(config, stages[fullest], num_blocks, needed[fullest])
    if fitted is not config:
        return plan_memory(fitted, activations, measure_first=measure_first)
    return config, memory_plan(stages[fullest], num_blocks, needed[fullest])


def has_room_beside(config: RunnerConfig) -> bool:
    """Whether the device holds the weights, and so much more that nothing is lost where they are read before the plan
    is made.
    """
    rest = [_usable_bytes(stage) - stage.weight_bytes - state_bytes(stage) for stage in config.stages]
    return min(rest) >= ROOM_BESIDE


def memory_plan(config: RunnerConfig, num_blocks: int, activation_bytes: int) -> MemoryPlan:
    """The plan of a cache of `num_blocks` blocks, whether it fits or not."""
    limits = config.scheduler
    cache = config.cache_config(num_blocks)
    concurrency = max_concurrency(cache, limits.max_model_len, max_chunk=limits.max_num_batched_tokens)
    used = config.weight_bytes + state_bytes(config) + activation_bytes + num_blocks * config.block_bytes
    unused = max(int(_usable_bytes(config)) - used, 0)
    return MemoryPlan(
        device=config.target.kind,
        platform=config.target.platform,
        total_bytes=config.target.total_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weight_bytes=config.weight_bytes,
        activation_bytes=activation_bytes,
        state_bytes=state_bytes(config),
        adapter_bytes=config.adapter_bytes,
        max_loras=0 if config.lora is None else config.lora.max_loras,
        max_lora_rank=0 if config.lora is None else config.lora.max_lora_rank,
        kv_cache_bytes=num_blocks * config.block_bytes,
        kv_cache_limit=_binding_limit(config, num_blocks),
        unused_bytes=unused,
        unused_why=_why_unused(config, num_blocks) if unused >= config.block_bytes else "less than a block",
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        num_rows=config.row_capacity,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        num_tokens=int(concurrency * limits.max_model_len),
        max_concurrency=concurrency,
        kv_bytes_per_token=config.kv_bytes_per_token,
        tensor_parallel_size=config.target.num_devices,
        data_parallel_size=config.data_parallel_size,
        weight_sharers=config.target.sharers,
        pipeline_parallel_size=config.stage.count if config.stage else 1,
        stage=config.stage.index if config.stage else 0,
        host_cache_bytes=config.host_cache_bytes,
        num_host_blocks=config.num_host_blocks,
        host_weight_bytes=config.host_weight_bytes,
        num_host_layers=len(config.offloaded),
        encoder_bytes=encoder_bytes(config),
        tower_bytes=config.tower_bytes,
        encoder_tokens=0 if config.vision is None else config.vision.num_vectors(config.encoder_patches),
        encoder_cache_tokens=limits.encoder_cache_tokens,
    )


def _usable_bytes(config: RunnerConfig) -> float:
    """What the engine may have of one device; on a CPU what lies on the host is in the same memory."""
    target = config.target
    usable = min(target.total_bytes * config.gpu_memory_utilization, target.free_bytes)
    if config.platform != "cpu":
        return usable
    blocks = config.host_cache_bytes / (target.num_devices * (config.stage.count if config.stage else 1))
    return usable - blocks - config.host_weight_bytes


def _why_unused(config: RunnerConfig, num_blocks: int) -> str:
    if config.num_gpu_blocks_override is not None:
        return "num_gpu_blocks_override leaves it"
    if config.kv_cache_memory_bytes is not None:
        return "kv_cache_memory_bytes leaves it"
    if num_blocks >= _most_blocks(config):
        return "max_num_seqs requests of max_model_len tokens fit"
    if _binding_limit(config, num_blocks) is not None:
        return "left to what else runs here"
    if _within_reach(config, num_blocks + 1) == num_blocks:
        return "kernels cannot address a KV cache of one-byte numbers that has 2 to 4 GiB"
    return "the blocks are rounded, so that the next start finds its compiled programs"


def blocks_of_one(config: RunnerConfig) -> int:
    """Blocks of one request of max_model_len tokens."""
    limits = config.scheduler
    return blocks_per_request(
        config.groups, config.block_size, limits.max_model_len, max_chunk=limits.max_num_batched_tokens
    )


def _check_explicit_cache(config: RunnerConfig, num_blocks: int, activation_bytes: int) -> None:
    """Refuse a cache that the user asked for and the device cannot hold."""
    total, others = config.target.total_bytes, config.weight_bytes + state_bytes(config) + activation_bytes
    size = num_blocks * config.block_bytes
    most = _within_reach(config, num_blocks)
    if most < num_blocks:
        numbers = _page_numbers(config)
        problem = (
            f"a KV cache of {num_blocks} blocks has {num_blocks * numbers} numbers of one byte on a device, and "
            "kernels cannot address one of 2 to 4 GiB."
        )
        advice = f"Set num_gpu_blocks_override to at most {most} or at least {2**32 // numbers + 1}."
    else:
        most = min(_addressable_blocks(config), max(total - others, 0) // config.block_bytes)
        problem = (
            f"a KV cache of {num_blocks} blocks ({size / GIB:.2f} GiB) does not fit: the device has "
            f"{total / GIB:.2f} GiB, of which {others / GIB:.2f} GiB are for weights, state and activations."
        )
        advice = f"Set num_gpu_blocks_override <= {most} or kv_cache_memory_bytes <= {most * config.block_bytes}."
    if num_blocks > most:
        plan, share = memory_plan(config, num_blocks, activation_bytes), (size + others) / total
        raise DoesNotFitError(problem, advice, plan, longest=_longest(config, most), share=share, enough_blocks=most)


def _addressable_blocks(config: RunnerConfig) -> int:
    """Blocks whose rows (one key or value of one head) have int32 indices."""
    rows = config.layers_per_group * math.prod(config.page_shape[:-1])
    return (2**31 - 1) // rows


def _page_numbers(config: RunnerConfig) -> int:
    """Numbers of a block, on one device."""
    return config.layers_per_group * math.prod(config.page_shape)


def _within_reach(config: RunnerConfig, num_blocks: int) -> int:
    """The most blocks, of so many, of a cache that the kernels can address (`storage.check_addressable`)."""
    backend, dtype = config.backend, config.cache_dtype
    if backend.implementation == "xla" or dtype.itemsize > 1 or not backend.supports(dtype):
        return num_blocks
    page = _page_numbers(config)
    return 2**31 // page if 2**31 < num_blocks * page <= 2**32 else num_blocks


def _fit(config: RunnerConfig, stage: RunnerConfig, num_blocks: int, activation_bytes: int) -> RunnerConfig:
    """Make one request of max_model_len tokens fit into the cache.

    Args:
        stage: of the pipeline, the one with the least room; else the configuration itself.

    Returns:
        The configuration itself when one fits; otherwise, where that is allowed, one with a max_model_len that does.

    Raises:
        DoesNotFitError: it does not fit.
    """
    limits = config.scheduler
    needed = blocks_of_one(config)
    if num_blocks - 1 >= needed:
        return config
    longest = _longest(config, num_blocks)
    if not config.fit_max_model_len or longest < 1:
        others = stage.weight_bytes + state_bytes(stage) + activation_bytes
        share = ((needed + 1) * stage.block_bytes + others) / stage.target.total_bytes
        problem, advice = _too_small(stage, num_blocks, needed, longest, share)
        plan = memory_plan(stage, num_blocks, activation_bytes)
        raise DoesNotFitError(problem, advice, plan, longest=longest, share=share, enough_blocks=needed + 1)
    logger.info(
        "Auto-fit max_model_len: reduced from %d to %d to fit in available KV cache memory",
        limits.max_model_len,
        longest,
    )
    return dataclasses.replace(config, scheduler=dataclasses.replace(limits, max_model_len=longest))


def _num_blocks(config: RunnerConfig, budget: float) -> int:
    """Blocks for a cache of `budget` bytes, as far as the user left it to us; block 0 included."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return max(config.kv_cache_memory_bytes // config.block_bytes, 1)
    most, one = _most_blocks(config), 1 + blocks_of_one(config)
    if config.platform == "cpu":
        budget = min(budget, max(CPU_CACHE_LIMIT, one * config.block_bytes))
    blocks = max(min(int(budget // config.block_bytes), _addressable_blocks(config)), 1)
    return _within_reach(config, most if blocks >= most else max(quantize_blocks(blocks), min(one, blocks)))


def _most_blocks(config: RunnerConfig) -> int:
    """Blocks that as many of the longest requests as can run at once would fill, rounded up to few sizes, which are
    part of every compiled step; more are of no use.
    """
    if not config.model.causal:
        # a prompt is computed in one step; two steps are under way at once
        limits = config.scheduler
        full = -(-limits.max_num_batched_tokens // config.block_size) + limits.max_num_seqs
        useful = max(2 * full, blocks_of_one(config)) * len(config.groups)
    else:
        useful = config.scheduler.max_num_seqs * blocks_of_one(config)
    return 1 + block_capacity(useful, config.block_bytes, config.platform)


def _binding_limit(config: RunnerConfig, num_blocks: int) -> int | None:
    """The CPU's limit on the cache, when it is what kept the cache from being larger."""
    if config.platform != "cpu" or config.has_explicit_cache or num_blocks >= _most_blocks(config):
        return None
    return CPU_CACHE_LIMIT if num_blocks * config.block_bytes <= CPU_CACHE_LIMIT else None


def _longest(config: RunnerConfig, num_blocks: int) -> int:
    """Most tokens of one request that a cache of `num_blocks` holds, at most max_model_len."""
    limits = config.scheduler
    return max_tokens_per_request(
        config.cache_config(num_blocks), max_chunk=limits.max_num_batched_tokens, limit=limits.max_model_len
    )


def _too_small(config: RunnerConfig, num_blocks: int, needed: int, longest: int, share: float) -> tuple[str, str]:
    """What is wrong, and what would help.

    Args:
        share: of the device's memory that would be enough.
    """
    limits = config.scheduler
    need, have = (needed + 1) * config.block_bytes, num_blocks * config.block_bytes
    knob = f"gpu_memory_utilization to {math.ceil(share * 1000 + 1) / 1000:g}"
    if share * config.target.total_bytes > config.target.free_bytes:
        knob = "the device's free memory"
    if share > 1:
        knob = "the device's memory"
    if config.num_gpu_blocks_override is not None:
        knob = f"num_gpu_blocks_override to {needed + 1}"
    elif config.kv_cache_memory_bytes is not None:
        knob = f"kv_cache_memory_bytes to {need}"
    if longest < 1:
        return (
            "No available memory for the cache blocks. "
            f"One request of {limits.max_model_len} tokens needs {need / GIB:.2f} GiB of KV cache.",
            f"Try increasing {knob}, or a smaller dtype, max_num_batched_tokens or max_num_seqs.",
        )
    return (
        f"To serve at least one request with the model's max seq len ({limits.max_model_len}), {need / GIB:.3f} GiB KV "
        f"cache is needed, which is larger than the available KV cache memory ({have / GIB:.3f} GiB). Based on the "
        f"available memory, the estimated maximum model length is {longest}.",
        f"Try increasing {knob} or decreasing max_model_len to at most {longest}.",
    )
