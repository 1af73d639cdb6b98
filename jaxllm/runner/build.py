"""From a checkpoint and its configuration to a runner: plan the memory, then load, allocate and compile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.decoder import Params
from jaxllm.models.model import base_prefix
from jaxllm.models.pooler import PoolingModel
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.heads.pooling_programs import PoolingPrograms
from jaxllm.runner.heads.pooling_rows import PoolingRows
from jaxllm.runner.heads.pooling_runner import PoolingRunner
from jaxllm.runner.memory import freed_memory
from jaxllm.runner.memory.compiled_plan import compiled_plan
from jaxllm.runner.memory.plan import MemoryPlan
from jaxllm.runner.null import NullRunner
from jaxllm.runner.runner import Runner
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.runner.step import State

if TYPE_CHECKING:
    from jaxllm.weights.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A runner, ready for its first step, and what the engine must know of it."""

    runner: Runner | PoolingRunner | NullRunner
    scheduler: SchedulerConfig
    cache: CacheConfig
    plan: MemoryPlan


def build_runner(
    config: RunnerConfig,
    checkpoint: Checkpoint,
    record: Callable[[str, float], None],
    background: concurrent.futures.Executor,
) -> Built:
    """Build a runner.

    Args:
        record: told each start-up phase and its seconds.
        background: reads the weights while programs are compiled, on a CPU.

    Raises:
        ValidationError: the KV cache does not hold one request; the text says what would.
        WeightsError: the checkpoint does not fit the model.
    """
    clock = _Clock(record)
    specs, prefix = config.specs(), base_prefix(config.model)
    checkpoint.check(specs, prefix=prefix)  # before anything takes long
    compiling: list[float] = []
    config, programs, plan = compiled_plan(config, compiled=compiling.append)
    # the plan asks the compiler about the largest programs, which the engine keeps
    clock.lap("plan", of_next=sum(compiling))

    def load(stop: threading.Event | None = None) -> Params | PoolingModel:
        return checkpoint.load(
            specs,
            jnp.dtype(config.dtype),
            config.sharding,
            prefix=prefix,
            seed=config.seed,
            progress=config.progress,
            stop=stop,
        )

    on_cpu, stop = config.platform == "cpu", threading.Event()
    # elsewhere they come last: a GPU's compiler tries out products on the card, which must not be full
    reading = [background.submit(load, stop)] if on_cpu else []

    def weights() -> Params | PoolingModel:
        return reading.pop().result() if reading else load()

    try:
        programs.compile_all(config.progress)
        freed_memory.give_back_code()
        clock.lap("compile")
        # on a CPU the cache is zeroed while they are read
        runner = _runner(config, None if on_cpu else weights(), weights, programs, plan.num_blocks)
        runner.restore_weights()
    except BaseException:
        stop.set()
        raise
    clock.lap("load weights")
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


class _Clock:
    def __init__(self, record: Callable[[str, float], None]):
        self._record, self._last = record, time.perf_counter()

    def lap(self, phase: str, *, of_next: float = 0.0) -> None:
        """End a phase, of whose seconds `of_next` belong to the one after it."""
        now = time.perf_counter() - of_next
        self._record(phase, now - self._last)
        self._last = now
