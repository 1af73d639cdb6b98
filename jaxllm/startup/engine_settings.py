"""What a running engine is said to have been started with, for advice (`jaxllm.tuning`)."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from jaxllm.config.refusals import host_blocks, several_decode_steps
from jaxllm.engine.observe.engine_settings import EngineSettings

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.runner.memory.plan import MemoryPlan
    from jaxllm.runner.runner_config import RunnerConfig


def engine_settings(
    args: EngineArgs, config: RunnerConfig, limits: SchedulerConfig, plan: MemoryPlan, *, num_devices: int
) -> EngineSettings:
    """The settings of an engine.

    Args:
        limits: those that hold, which memory may have lowered.
        num_devices: that JAX has in all.
    """
    sized_by = "gpu_memory_utilization"
    if args.num_gpu_blocks_override is not None:
        sized_by = "num_gpu_blocks_override"
    elif args.kv_cache_memory_bytes is not None or plan.kv_cache_limit is not None or args.load_format == "null":
        sized_by = "kv_cache_memory_bytes"
    active = limits.max_num_active_seqs
    single_steps = several_decode_steps(args) is not None or args.enforce_eager or config.pooler is not None
    keeps_host_blocks = host_blocks(args, num_processes=config.target.num_processes) is None
    return EngineSettings(
        model=str(args.model),
        platform=plan.platform,
        max_num_seqs=limits.max_num_seqs,
        max_num_active_seqs=active if active is not None and active < limits.max_num_seqs else None,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_encoder_input_tokens=limits.max_encoder_tokens or None,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        windows=tuple(group.sliding_window for group in config.groups),
        block_bytes=config.block_bytes,
        int8_block_bytes=_int8_block_bytes(config),
        sized_by=sized_by,
        gpu_memory_utilization=args.gpu_memory_utilization,
        total_bytes=plan.total_bytes or None,
        weight_bytes=plan.weight_bytes,
        other_bytes=plan.activation_bytes + plan.state_bytes,
        more_devices=max(0, num_devices - args.grid.size),
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        kv_offloading_size=args.kv_offloading_size or 0.0,
        host_block_bytes=config.host_block_bytes * args.data_parallel_size if keeps_host_blocks else None,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=limits.enable_chunked_prefill,
        async_scheduling=args.async_scheduling,
        enforce_eager=args.enforce_eager,
        has_four_rows=config.has_four_rows,
        num_decode_steps=limits.num_decode_steps,
        one_step_at_a_time=single_steps,
        long_prefill_token_threshold=limits.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=limits.long_prefill_token_threshold_adaptive,
        num_speculative_tokens=limits.num_drafts,
        tokenizer_pool_size=args.tokenizer_pool_size,
        num_processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


def _int8_block_bytes(config: RunnerConfig) -> int | None:
    if config.cache_dtype.itemsize == 1 or config.pipeline:
        return None
    return dataclasses.replace(config, kv_dtype="int8").block_bytes
