"""The memory plan by the compiler's own account: an engine's programs, compiled for its devices, there or not."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxllm.models.decoder import DecoderConfig, Params
from jaxllm.models.pooler import PoolingModel
from jaxllm.runner.buckets import decode_step_buckets, make_buckets
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.heads.pooling_programs import PoolingPrograms
from jaxllm.runner.heads.pooling_step import PoolingState, PoolingStepConfig
from jaxllm.runner.memory.fit import plan_memory
from jaxllm.runner.memory.plan import MemoryPlan
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.runner.step import State, StepConfig


def compiled_plan(
    config: RunnerConfig, *, measure_first: bool = False, compiled: Callable[[float], object] = lambda _: None
) -> tuple[RunnerConfig, Programs | PoolingPrograms, MemoryPlan]:
    """`plan_memory`, and the programs of the plan, of which the largest are compiled.

    Args:
        compiled: told the seconds that compiling them took, each time.

    Raises:
        DoesNotFitError: the KV cache does not hold one request.
    """
    params = config.params()
    made: list[Programs | PoolingPrograms] = []

    def activations(config: RunnerConfig, num_blocks: int) -> int:
        made[:] = [make_programs(config, params, num_blocks)]
        began = time.perf_counter()
        measured = made[0].activation_bytes()
        compiled(time.perf_counter() - began)
        return measured

    config, plan = plan_memory(config, activations, measure_first=measure_first)
    return config, made[0], plan


def make_programs(config: RunnerConfig, params: Params | PoolingModel, num_blocks: int) -> Programs | PoolingPrograms:
    platform, state, limits = config.platform, config.state(num_blocks), config.scheduler
    # XLA's attention loops over what there is, so a step of single tokens costs nothing more in any bucket
    decode_only = config.backend.implementation not in ("xla", "reference")
    buckets = make_buckets(
        limits.max_num_batched_tokens, limits.max_num_seqs, eager=config.enforce_eager, decode_only=decode_only
    )
    if config.pooler is not None:
        assert isinstance(params, PoolingModel) and isinstance(state, PoolingState)
        return PoolingPrograms(
            PoolingStepConfig(
                model=config.step_model, groups=config.groups, pooler=config.pooler, backend=config.backend
            ),
            buckets,
            config.table_width,
            params,
            state,
            limits.max_num_seqs,
            platform=platform,
            cache_dir=config.compile_cache,
        )
    assert isinstance(params, Params) and isinstance(state, State) and isinstance(config.step_model, DecoderConfig)
    return Programs(
        StepConfig(
            model=config.step_model,
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
        num_decode_steps=limits.num_decode_steps,
        decode_buckets=decode_step_buckets(buckets, limits.max_decode_steps_seqs),
    )
