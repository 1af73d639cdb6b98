"""The compiled programs of a pipeline: those of each stage for its own devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.models.params import Params
from jaxllm.parallel.stages import Stage
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.programs import KeptProgram, Key
from jaxllm.runner.compile.progress import PartProgress, StartProgress, Tally
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_step import State, StepConfig
from jaxllm.runner.heads.stage_step import PipelineState, stage_step, take_sampled
from jaxllm.runner.heads.weight_forms import with_whole_segments
from jaxllm.runner.packing import Packing
from pallas_kernels.backend import Backend

TAKE: Key = ("take sampled",)


class StagePrograms(SamplingPrograms):
    """A stage's step for every bucket; the last stage has samplers besides.

    Args:
        hidden: dtype of what stages hand on.
        config, buckets, table_width, params, state: of the stage, as `SamplingPrograms` takes them.
        others: the rest of what it takes.
    """

    def __init__(
        self,
        stage: Stage,
        hidden: np.dtype,
        config: StepConfig,
        buckets: tuple[Bucket, ...],
        table_width: int,
        params: Params,
        state: State,
        **others: Any,
    ):
        self.stage, self._hidden_dtype = stage, hidden
        super().__init__(config, buckets, table_width, params, state, **others)

    def lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(stage_step, self.config, self.stage, bucket, packing)
        words = self._words(packing.size + self.sample_packing.size)
        out = self._state_specs, jax.P(), jax.P()
        # vectors of prompts take the place of the embedding, which only the first stage has
        given = self.embeddings(bucket) if self.stage.is_first else (self._hidden(bucket.tokens),)
        return self._lowered(function, self._params_for(bucket), self._state, words, *given, donate=1, out=out)

    def lower_take(self) -> jax.stages.Lowered:
        packing = self.sample_packing
        function = functools.partial(take_sampled, packing)
        ids = self._words(self.max_num_seqs)
        return self._lowered(function, self._state.tokens, ids, self._words(packing.size), donate=0)

    def _hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._rows(self._hidden_dtype, rows, self.config.model.hidden_size)

    @property
    def head_shape(self) -> Any:
        """Of the last stage's head."""
        return self._params.head

    def _with_whole(self, params: Params, backend: Backend, *, one_row: bool) -> Params:
        return with_whole_segments(params, backend, one_row=one_row)

    def _keys(self) -> list[Key]:
        forwards: list[Key] = [("forward", bucket) for bucket in self.packings]
        if self.stage.is_last:
            return super()._keys()
        return [*forwards, TAKE] if self.stage.is_first else forwards

    def _step(self, bucket: Bucket, num_seqs: int) -> tuple[Key, ...]:
        return super()._step(bucket, num_seqs) if self.stage.is_last else (("forward", bucket),)

    def _largest(self) -> list[tuple[Key, ...]]:
        if self.stage.is_last:
            return super()._largest()
        encoder = () if self.encoder is None else (self.encoder.keys[-1],)
        return [(key,) for key in (("forward", self.largest), *encoder)]

    def _lowerings(self) -> dict[str, Callable[..., jax.stages.Lowered]]:
        return {**super()._lowerings(), TAKE[0]: self.lower_take}

    @property
    def handed_on_bytes(self) -> int:
        """Of the hidden states that its largest step receives, and of those that it sends."""
        hidden = self._hidden(self.largest.tokens)
        size = math.prod(hidden.shape) * self._hidden_dtype.itemsize
        return size * ((not self.stage.is_first) + (not self.stage.is_last))

    @property
    def take(self) -> jax.stages.Compiled:
        return self._get(TAKE)


class PipelinePrograms:
    """The programs of all stages.

    Args:
        make: (stage, progress) -> its programs, not compiled yet.
        params: shapes of the whole model's weights, each with the sharding of its stage.
        progress: told how far compiling is, of all stages together; None: nobody is.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        make: Callable[[Stage, StartProgress], StagePrograms],
        params: Params,
        progress: StartProgress | None,
    ):
        self._progress, self._tally = progress or StartProgress(quiet=True), Tally()
        self.stages = tuple(make(stage, PartProgress(self._progress, self._tally, stage.index)) for stage in stages)
        self._params = params

    @property
    def first(self) -> StagePrograms:
        return self.stages[0]

    @property
    def last(self) -> StagePrograms:
        return self.stages[-1]

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of what every device of the last stage has whole."""
        return self.last.sharding

    @property
    def packings(self) -> dict[Bucket, Packing]:
        """Those of any stage."""
        return self.last.packings

    @property
    def param_shardings(self) -> Any:
        """Of each array of the weights."""
        return jax.tree.map(lambda shape: shape.sharding, self._params)

    @property
    def spare_bytes(self) -> int:
        """As `Programs.spare_bytes`."""
        return sum(stage.spare_bytes for stage in self.stages)

    @property
    def were_found(self) -> bool:
        """As `Programs.were_found`."""
        return all(stage.were_found for stage in self.stages)

    def _begin(self) -> None:
        counts = [stage.counts() for stage in self.stages]
        self._tally.total = sum(total for total, _ in counts)
        unknown = [missing for _, missing in counts if missing is not None]
        self._progress.begin(self._tally.total, sum(unknown) if len(unknown) == len(counts) else None)

    def activation_bytes(self) -> tuple[int, ...]:
        """Of each stage, as `Programs.activation_bytes`, and what it has received and sent in the steps under way."""
        self._begin()
        return tuple(stage.activation_bytes() + len(self.stages) * stage.handed_on_bytes for stage in self.stages)

    def encoder_activation_bytes(self) -> int | None:
        """As `Programs.encoder_activation_bytes`."""
        return self.first.encoder_activation_bytes()

    def compile_all(self) -> None:
        """Compile what is missing."""
        self._begin()
        for stage in self.stages:
            stage.compile_all()

    #: a start waits for all of them
    compile_first = compile_all

    def kept(self) -> list[KeptProgram]:
        """As `Programs.kept`, of all stages."""
        return [
            program._replace(name=f"stage {1 + stage.stage.index}: {program.name}")
            for stage in self.stages
            for program in stage.kept()
        ]

    def allocate(self) -> PipelineState:
        """The state, zeroed, each stage's part in its place."""
        return PipelineState(stages=tuple(stage.allocate() for stage in self.stages))
