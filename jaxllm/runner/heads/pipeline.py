"""The head of a model in pipeline stages: each step goes from stage to stage, and what is sampled back to the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.engine.step import SchedulerOutput
from jaxllm.models.adapters import with_adapters
from jaxllm.models.params import Params
from jaxllm.multimodal.items import EncoderInput
from jaxllm.parallel.stages import stage_params
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.heads.embeddings import Embeddings
from jaxllm.runner.heads.pictures import Pictures
from jaxllm.runner.heads.pipeline_programs import PipelinePrograms
from jaxllm.runner.heads.sampling import LaunchedStep, SamplingHead
from jaxllm.runner.heads.stage_clock import StageClock
from jaxllm.runner.heads.stage_step import PipelineState, Unwritten
from jaxllm.runner.heads.step_results import StepResult
from jaxllm.runner.heads.weight_forms import Form
from jaxllm.runner.rows import Rows


class _Handed(NamedTuple):
    """What a step's stages leave for its sampler."""

    #: `sample_packing`'s fields, on the first stage's devices and on the last one's
    first: jax.Array
    last: jax.Array
    #: what each stage but the last has handed on
    hidden: tuple[jax.Array, ...]
    #: of the step; -1: nobody knows
    step: int = -1
    rows: frozenset[int] = frozenset()
    #: `Hidden.load` of each stage but the last; (): nobody counts
    loads: tuple[jax.Array, ...] = ()


class PipelineHead(SamplingHead):
    """Launches a step at every stage at once: each program waits for what the one before it hands on, and the host for
    none of them. Samples with the last stage's programs.
    """

    def __init__(self, pipeline: PipelinePrograms):
        super().__init__(pipeline.last)
        self._pipeline = pipeline
        self._embeddings, self._pictures = Embeddings(pipeline.first), Pictures(pipeline.first)
        #: of each stage its weights, as programs of several rows take them and as those of a single row do
        self._stages: tuple[tuple[Params, dict[Form, Params]], ...] = ()
        #: the latter with adapters
        self._adapted_stages: tuple[dict[Form, Params], ...] = ()
        #: told of each launch
        self._clocks: tuple[StageClock, ...] = ()
        #: the last stage's own copy of the embedding, where that is the head
        self._tied: Any = None

    @property
    def allocator(self) -> PipelinePrograms:
        return self._pipeline

    def use(self, params: Params | None) -> None:
        self._stages, self._head, self._pictures.params = (), None, None
        self._free_copy()
        if params is None:
            return
        if params.head is None:
            places = jax.tree.map(lambda shape: shape.sharding, self._pipeline.last.head_shape)
            self._tied = jax.device_put(params.embedding, places, may_alias=False)
        self._pictures.params, params = params.vision, dataclasses.replace(params, vision=None)
        cut = []
        for programs in self._pipeline.stages:
            part = stage_params(params, programs.stage, self._tied)
            cut.append((part, programs.forms(part)))
        self._stages = tuple(cut)
        self._head = self.programs.head_params(cut[-1][0])
        self._adapt()

    def _adapt(self) -> None:
        self._adapt_head()
        self._adapted_stages = tuple(
            {form: with_adapters(params, adapters) for form, params in forms.items()}
            for (_, forms), adapters in zip(self._stages, self._adapters, strict=False)
        )

    def encode(self, state: Any, inputs: Sequence[EncoderInput]) -> PipelineState:
        first, *others = state.stages
        return dataclasses.replace(state, stages=(super().encode(first, inputs), *others))

    def _warm_up_pictures(self, state: Any, *, smallest: bool) -> PipelineState:
        first, *others = state.stages
        return dataclasses.replace(state, stages=(super()._warm_up_pictures(first, smallest=smallest), *others))

    def forward(self, state: Any, scheduled: SchedulerOutput, rows: Rows) -> tuple[PipelineState, LaunchedStep]:
        needed = {row for row, start in zip(scheduled.rows, scheduled.starts, strict=True) if start >= rows.known[row]}
        state, launched = super().forward(self._take_sampled(state, needed), scheduled, rows)
        handed: Any = launched.sampling
        for clock in self._clocks:
            for stage, hidden in enumerate(handed.hidden):
                clock.launched(scheduled.step, stage, hidden)
        handed = handed._replace(hidden=(), step=scheduled.step, rows=frozenset(scheduled.rows))
        return state, launched._replace(sampling=handed)

    def sample(self, state: Any, launched: LaunchedStep, masks: Mapping[int, np.ndarray]) -> tuple[Any, StepResult]:
        if not len(launched.packed.sampled_entries):
            self._tell_end(launched.sampling, launched.hidden.sampled)
        return super().sample(state, launched, masks)

    def _loads(self, launched: LaunchedStep) -> tuple[jax.Array, ...]:
        handed: Any = launched.sampling
        return (*handed.loads, *super()._loads(launched))

    def _tell_end(self, handed: Any, array: jax.Array) -> None:
        for clock in self._clocks:
            clock.launched(handed.step, len(self._pipeline.stages) - 1, array)

    def caches(self, state: Any) -> list[tuple[Programs, Any]]:
        return [(programs, own.cache) for programs, own in zip(self._pipeline.stages, state.stages, strict=True)]

    def with_caches(self, state: Any, caches: Sequence[Any]) -> PipelineState:
        stages = (dataclasses.replace(own, cache=cache) for own, cache in zip(state.stages, caches, strict=True))
        return dataclasses.replace(state, stages=tuple(stages))

    def time_stages(self) -> StageClock:
        def stopped(clock: StageClock) -> None:
            self._clocks = tuple(other for other in self._clocks if other is not clock)

        clock = StageClock(len(self._pipeline.stages), stopped)
        self._clocks += (clock,)
        return clock

    def warm_up(self, state: Any, *, smallest: bool) -> PipelineState:
        return self._take_sampled(super().warm_up(state, smallest=smallest), set(), at_most=0)

    def free(self) -> None:
        super().free()
        self._free_copy()

    def _free_copy(self) -> None:
        for array in jax.tree.leaves(self._tied):
            if not array.is_deleted():
                array.delete()
        self._tied = None

    def _take_sampled(self, state: Any, rows: set[int], at_most: int | None = None) -> Any:
        """Write what steps have sampled into the first stage's tokens, up to the last step that has one of these rows.

        Args:
            at_most: steps that may stay unwritten; None: as many as there are stages.
        """
        unwritten = state.unwritten
        count = max((i for i, step in enumerate(unwritten, 1) if not rows.isdisjoint(step.rows)), default=0)
        count = max(count, len(unwritten) - (len(state.stages) if at_most is None else at_most))
        first, *others = state.stages
        for step in unwritten[:count]:
            tokens = self._pipeline.first.take(first.tokens, step.ids, step.sampling)
            first = dataclasses.replace(first, tokens=tokens)
        return PipelineState(stages=(first, *others), unwritten=unwritten[count:])

    def _forward(
        self, state: Any, bucket: Bucket, buffer: np.ndarray, vectors: np.ndarray | None = None
    ) -> tuple[PipelineState, Any, Any]:
        given = self._embeddings.argument(bucket, vectors)
        made, handed_on, sampling, loads = [], [], [], []
        for programs, params, own in zip(self._pipeline.stages, self._stages, state.stages, strict=True):
            words = jax.device_put(buffer, programs.sharding)
            if programs.stage.index:
                given = (jax.device_put(given[0], programs.sharding),)
            forms = self._adapted_stages[programs.stage.index] if bucket.adapters else params[1]
            weights = forms[programs.form(bucket)]
            new, hidden, rest = programs.forward(bucket)(weights, own, words, *given)
            if isinstance(hidden, tuple):
                hidden, load = hidden
                loads.append(load)
            given = (hidden,)
            made.append(new)
            sampling.append(rest)
            handed_on.append(hidden)
        *between, last = handed_on
        handed = _Handed(sampling[0], sampling[-1], tuple(between), loads=tuple(loads))
        return dataclasses.replace(state, stages=tuple(made)), last, handed

    def _sample(
        self, state: Any, hidden: Any, sampling: Any, constraints: np.ndarray | None, count: int, full: bool
    ) -> tuple[PipelineState, Any]:
        *others, last = state.stages
        last, sampled = super()._sample(last, hidden, sampling.last, constraints, count, full)
        self._tell_end(sampling, sampled.token_ids)
        ids = jax.device_put(sampled.token_ids, self._pipeline.first.sharding)
        new = Unwritten(ids=ids, sampling=sampling.first, rows=sampling.rows)
        return PipelineState(stages=(*others, last), unwritten=(*state.unwritten, new)), sampled

    def _write_tokens(self, state: Any, row: int, ids: np.ndarray, replica: int = 0) -> PipelineState:
        """As `SamplingHead` does, for penalties: at the last stage."""
        *others, last = state.stages
        return dataclasses.replace(state, stages=(*others, super()._write_tokens(last, row, ids, replica)))
