"""From a checkpoint and its configuration to a runner: plan the memory, then load, allocate and compile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.adapters import adapter_modules, adapter_tables
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.model import base_prefix
from jaxllm.models.params import Params, without_draft
from jaxllm.models.pooler import PoolingModel
from jaxllm.parallel.processes import of_all_processes
from jaxllm.parallel.stages import Stage
from jaxllm.runner.adapter_stacks import AdapterStacks
from jaxllm.runner.buckets import decode_step_buckets, draft_buckets, make_buckets, with_adapters
from jaxllm.runner.compile.encoder import encoder_buckets
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.workers import Workers
from jaxllm.runner.device_state import device_state, spare_bytes
from jaxllm.runner.heads.head import Head
from jaxllm.runner.heads.joint import JointHead
from jaxllm.runner.heads.pipeline import PipelineHead
from jaxllm.runner.heads.pipeline_programs import PipelinePrograms, StagePrograms
from jaxllm.runner.heads.pooling import PoolingHead, PoolingPrograms
from jaxllm.runner.heads.pooling_step import PoolingState, PoolingStepConfig
from jaxllm.runner.heads.sampling import SamplingHead
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_step import State, StepConfig
from jaxllm.runner.joint_runner import JointRunner
from jaxllm.runner.memory import freed_memory
from jaxllm.runner.memory.fit import has_room_beside, plan_memory
from jaxllm.runner.memory.plan import MemoryPlan
from jaxllm.runner.padding_cost import PaddingCost
from jaxllm.runner.rows import Rows
from jaxllm.runner.runner import Runner
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxllm.runner.null import NullRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A runner, ready for its first step, and what the engine must know of it."""

    runner: Runner | JointRunner | NullRunner
    scheduler: SchedulerConfig
    cache: CacheConfig
    plan: MemoryPlan
    #: those that have some that steps do without until they are made; None: all are there
    unfinished: Programs | None = None


def build_runner(
    config: RunnerConfig,
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    record: Callable[[str, float], None],
    background: concurrent.futures.Executor,
) -> Built:
    """Build a runner.

    Args:
        draft: of the model that drafts, where one does.
        record: told each start-up phase and its seconds.
        background: reads the weights while programs are compiled or loaded, on a CPU.

    Raises:
        ValidationError: the KV cache does not hold one request; the text says what would.
        WeightsError: the checkpoint does not fit the model.
    """
    clock = _Clock(record)
    specs, prefix = config.specs(), base_prefix(config.model)
    # before anything takes long
    checkpoint.check(without_draft(specs), prefix=prefix)
    if draft is not None and config.draft_model is not None:
        assert isinstance(specs, Params)
        draft.check(specs.draft, prefix=base_prefix(config.draft_model))

    def load(stop: threading.Event | None = None) -> Params | PoolingModel:
        read = functools.partial(
            Checkpoint.load,
            dtype=jnp.dtype(config.dtype),
            seed=config.seed,
            progress=config.progress is not None and config.progress.on_terminal,
            stop=stop,
        )
        sharding: Any = config.sharding
        params = read(checkpoint, without_draft(specs), sharding=without_draft(sharding), prefix=prefix)
        if draft is None or config.draft_model is None:
            return params
        assert isinstance(specs, Params) and isinstance(params, Params)
        own = sharding.draft if isinstance(sharding, Params) else sharding
        drafting = read(draft, specs.draft, sharding=own, prefix=base_prefix(config.draft_model))
        return dataclasses.replace(params, draft=drafting)

    on_cpu, stop = config.platform == "cpu", threading.Event()
    progress = config.progress or StartProgress(quiet=True)
    # A GPU's compiler tries out products on the card, which must not be full: there they come last. So they do on a CPU
    # with little memory, where the plan may refuse the model, and the compiler takes as much as a small one.
    reading: list[concurrent.futures.Future[Params | PoolingModel]] = []

    def begin_to_read() -> None:
        reading.append(background.submit(load, stop))
        progress.ends_with(reading[0])

    if on_cpu and has_room_beside(config):
        begin_to_read()

    def weights() -> Params | PoolingModel:
        if reading:
            return progress.result(reading.pop())
        # never in this thread, which Ctrl-C ends at once
        unwanted = threading.Event()
        with Workers(1, "load weights") as worker:
            try:
                return progress.result(worker.submit(load, unwanted))
            finally:
                unwanted.set()

    compiling: list[float] = []
    try:
        config, programs, plan = compiled_plan(config, compiled=compiling.append)
        # the plan asks the compiler about the largest programs, which the engine keeps
        clock.lap("plan", of_next=sum(compiling))
        if on_cpu and programs.were_found and not reading:
            begin_to_read()
        programs.compile_first()
        freed_memory.give_back_code()
        clock.lap("compile")
        # on a CPU the cache is made while they are read
        params = None if on_cpu else weights()
        runner = _runner(config, programs, params, weights)
        runner.restore_weights()
        # random ones are drawn by programs that were compiled for it
        freed_memory.give_back_code()
    except BaseException:
        stop.set()
        raise
    clock.lap("load weights")
    runner.warm_up()
    clock.lap("warm up")
    unfinished = programs if isinstance(programs, Programs) and programs.late else None
    cache = config.cache_config(plan.num_blocks)
    return Built(runner=runner, scheduler=config.scheduler, cache=cache, plan=plan, unfinished=unfinished)


def _runner(
    config: RunnerConfig, programs: Programs | PipelinePrograms, params: Any, reload: Callable[[], Any]
) -> Runner | JointRunner:
    limits, replicas = config.scheduler, config.target.replicas
    rows = [Rows(limits.max_num_seqs, len(config.groups), config.table_width) for _ in range(replicas)]
    if replicas > 1:
        assert isinstance(programs, SamplingPrograms)
        return JointRunner(params, reload, JointHead(programs), rows)
    padding = None
    if config.platform == "cpu" and config.enforce_eager:
        tokens, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        wanted = make_buckets(tokens, seqs, four_rows=config.has_four_rows)
        padding = PaddingCost(tuple(programs.packings), wanted)
    head, blocks = _head(programs, limits.max_num_seqs), config.num_host_blocks
    adapters = _adapters(config, programs)
    return Runner(params, reload, head, rows[0], padding, num_host_blocks=blocks, adapters=adapters)


def _adapters(config: RunnerConfig, programs: Any) -> list[AdapterStacks]:
    """Of each stage of a pipeline."""
    lora = config.lora
    if lora is None:
        return []
    # as a whole model's names have them, also where a stage has the embedding as its head
    tables = adapter_tables(config.unquantized_specs, head=config.head_name) if lora.has_tables else {}
    return [
        AdapterStacks(
            own,
            stage.adapter_specs(None),
            adapter_modules(stage.unquantized_specs, first_layer=0 if stage.stage is None else stage.stage.first),
            tables,
            rank=lora.max_lora_rank,
            dtype=jnp.dtype(lora.dtype),
            sharding=stage.target.sharding,
        )
        for stage, own in zip(config.stages, getattr(programs, "stages", (programs,)), strict=True)
    ]


def build_replica(config: RunnerConfig, first: Built) -> Runner:
    """Another runner of the same model: on the devices of the first one it shares its weights and programs, on others
    it has copies of the weights, and programs compiled for its own devices.

    Args:
        config: the first one's, on the devices of this one.
    """
    runner, plan = first.runner, first.plan
    assert isinstance(runner, Runner)
    programs = runner.head.programs
    config = dataclasses.replace(config, scheduler=first.scheduler)
    if config.target.sharers == 1:
        programs = make_programs(config, config.params(), plan.num_blocks)
        programs.compile_all()
        freed_memory.give_back_code()
    max_num_seqs = config.scheduler.max_num_seqs
    rows = Rows(max_num_seqs, len(config.groups), config.table_width)
    head, blocks = _head(programs, max_num_seqs), config.num_host_blocks
    adapters = _adapters(config, programs)
    replica = Runner(None, lambda: runner.params, head, rows, source=runner, num_host_blocks=blocks, adapters=adapters)
    replica.restore_weights()
    replica.warm_up()
    return replica


def compiled_plan(
    config: RunnerConfig, *, compiled: Callable[[float], object]
) -> tuple[RunnerConfig, Programs | PipelinePrograms, MemoryPlan]:
    """`plan_memory` by the compiler's own account, and the programs of the plan, of which the largest are compiled.

    Args:
        compiled: told the seconds that compiling them took, each time.

    Raises:
        DoesNotFitError: the KV cache does not hold one request.
    """
    params = config.params()
    made: list[Programs | PipelinePrograms] = []

    def activations(config: RunnerConfig, num_blocks: int) -> Sequence[int]:
        made[:] = [make_programs(config, params, num_blocks)]
        began = time.perf_counter()
        needed = made[0].activation_bytes()
        if config.scheduler.lockstep:
            # compilers of several processes may choose differently, and all need caches of one size
            needed = tuple(of_all_processes([needed] if isinstance(needed, int) else needed).max(axis=0).tolist())
        compiled(time.perf_counter() - began)
        return (needed,) if isinstance(needed, int) else needed

    config, plan = plan_memory(config, activations)
    return config, made[0], dataclasses.replace(plan, encoder_activation_bytes=made[0].encoder_activation_bytes())


def make_programs(config: RunnerConfig, params: Params | PoolingModel, num_blocks: int) -> Programs | PipelinePrograms:
    """The programs of an engine with so many blocks, not compiled yet.

    Args:
        params: `RunnerConfig.params`.
    """
    if config.pipeline:
        assert isinstance(params, Params)
        make = functools.partial(_stage_programs, config.stages, num_blocks)
        return PipelinePrograms(config.pipeline, make, params, config.progress)
    return _programs(config, params, num_blocks)


def _programs(config: RunnerConfig, params: Params | PoolingModel, num_blocks: int) -> Programs:
    """Of a whole model, or of a stage."""
    state, spare, limits = device_state(config, num_blocks), spare_bytes(config, num_blocks), config.scheduler
    # XLA's attention loops over what there is, so a step of single tokens costs nothing more in any bucket
    decode_only = config.backend.implementation not in ("xla", "reference")
    buckets = make_buckets(
        limits.max_num_batched_tokens,
        config.row_capacity,
        eager=config.enforce_eager,
        decode_only=decode_only,
        four_rows=config.has_four_rows,
    )
    if config.lora is not None:
        buckets = with_adapters(buckets)
    adapters = config.adapter_shapes()
    also = tuple if config.lora is None else with_adapters
    copied_layers = config.layers_per_group if config.num_host_blocks else 0
    if config.pooler is not None:
        assert isinstance(params, PoolingModel) and isinstance(state, PoolingState)
        return PoolingPrograms(
            PoolingStepConfig(
                model=config.step_model,
                groups=config.groups,
                pooler=config.pooler,
                context=config.context,
                prompt_embeds=config.prompt_embeds,
            ),
            buckets,
            config.table_width,
            params,
            state,
            platform=config.platform,
            cache_dir=config.compile_cache,
            spare_bytes=spare,
            copied_layers=copied_layers,
            progress=config.progress,
            adapters=adapters,
            media=config.media_fields,
            encoder_buckets=_encoder_buckets(config),
            pixel_normal=config.pixel_normal,
        )
    assert isinstance(params, Params) and isinstance(state, State) and isinstance(config.step_model, DecoderConfig)
    kind = SamplingPrograms
    if config.stage is not None:
        kind = functools.partial(StagePrograms, config.stage, jnp.dtype(config.dtype))
    return kind(
        StepConfig(
            model=config.step_model,
            groups=config.groups,
            context=config.context,
            num_logprobs=config.num_logprobs,
            logprobs_mode=config.logprobs_mode,
            prompt_embeds=config.prompt_embeds,
            expert_load=config.expert_load,
            drafter=config.step_drafter,
            processors=config.processors,
            max_scored_tokens=config.scheduler.max_scored_tokens,
        ),
        buckets,
        config.table_width,
        params,
        state,
        platform=config.platform,
        eager=config.enforce_eager,
        cache_dir=config.compile_cache,
        spare_bytes=spare,
        copied_layers=copied_layers,
        progress=config.progress,
        adapters=adapters,
        num_decode_steps=limits.num_decode_steps,
        decode_buckets=also(decode_step_buckets(buckets, limits.max_decode_steps_seqs)),
        draft_buckets=also(draft_buckets(limits.max_draft_seqs)),
        num_draft_steps=limits.num_draft_steps,
        media=config.media_fields,
        encoder_buckets=_encoder_buckets(config),
        num_rows=config.row_capacity,
        pixel_normal=config.pixel_normal,
        # a stage of a pipeline would wait for the others' programs
        answers_early=config.answers_early and config.stage is None,
    )


def _encoder_buckets(config: RunnerConfig) -> tuple[int, ...]:
    if config.vision is None:
        return ()
    return encoder_buckets(config.vision, config.encoder_patches, eager=config.enforce_eager)


def _stage_programs(
    stages: Sequence[RunnerConfig], num_blocks: int, stage: Stage, progress: StartProgress
) -> StagePrograms:
    config = dataclasses.replace(stages[stage.index], progress=progress)
    programs = _programs(config, config.params(), num_blocks)
    assert isinstance(programs, StagePrograms)
    return programs


def _head(programs: Programs | PipelinePrograms, max_num_seqs: int) -> Head:
    if isinstance(programs, PipelinePrograms):
        return PipelineHead(programs)
    if isinstance(programs, PoolingPrograms):
        return PoolingHead(programs, max_num_seqs)
    assert isinstance(programs, SamplingPrograms)
    return SamplingHead(programs)


class _Clock:
    def __init__(self, record: Callable[[str, float], None]):
        self._record, self._last = record, time.perf_counter()

    def lap(self, phase: str, *, of_next: float = 0.0) -> None:
        """End a phase, of whose seconds `of_next` belong to the one after it."""
        now = time.perf_counter() - of_next
        self._record(phase, now - self._last)
        self._last = now
