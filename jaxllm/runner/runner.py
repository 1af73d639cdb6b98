"""The device side of the engine: takes what the scheduler decided, launches the compiled step, gives back sampled
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.engine.step import AdmittedRequest, LogprobArrays, SchedulerOutput, StepOutput
from jaxllm.models.decoder import Params
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.compile.programs import WRITE_TOKENS, Programs
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.memory.device_memory import DeviceMemory
from jaxllm.runner.one_row import with_whole_layers
from jaxllm.runner.rows import NOTHING_LOST, PackedStep, RowTable
from jaxllm.runner.step import ENDED, Hidden, Sampled, State
from jaxllm.sampling.logprobs import Logprobs


class LaunchedStep(NamedTuple):
    """A step whose forward program is launched, and whose sampler is not."""

    hidden: Hidden
    sampling: jax.Array
    packed: PackedStep


class StepResult:
    """A launched step (`interface.StepFuture`).

    Args:
        lost: entries whose masks could not be made, bool.
        computed: is ready when the step is done, also where nobody samples.
    """

    def __init__(
        self,
        sampled: Sampled | None,
        scores: Logprobs | None,
        packed: PackedStep,
        lost: np.ndarray,
        computed: jax.Array,
    ):
        self._sampled, self._scores, self._packed = sampled, scores, packed
        self._lost, self._computed = lost, computed
        wanted: list[Any] = [scores]
        if sampled is not None:
            wanted += [sampled.token_ids, self._logprobs]
        for array in jax.tree.leaves(wanted):
            array.copy_to_host_async()

    @property
    def _logprobs(self) -> Logprobs | None:
        """What somebody wants of the step's log-probabilities."""
        if self._sampled is None or self._sampled.logprobs is None or not self._packed.want_logprobs:
            return None
        found = self._sampled.logprobs
        return found if self._packed.want_chosen else dataclasses.replace(found, chosen=None)  # pyright: ignore

    def result(self) -> StepOutput:
        packed, sampled = self._packed, self._sampled
        if sampled is None:
            # else the host would run ahead through a long prompt: steps would pile up, and a trace could not time them
            self._computed.block_until_ready()
        rows, counts = packed.flat_rows(self._lost)
        scores = None
        if self._scores is not None and packed.targets is not None:
            scores = _arrays(jax.tree.map(lambda x: np.asarray(x)[: packed.targets[0]], self._scores))  # pyright: ignore
        found = self._logprobs
        return StepOutput(
            token_ids=[] if sampled is None else np.asarray(sampled.token_ids)[rows].tolist(),
            counts=counts,
            logprobs=None if found is None else _arrays(jax.tree.map(lambda x: np.asarray(x)[rows], found)),
            prompt_logprobs=scores,
            scored_counts=packed.scored_counts,
        )


class SeveralStepsResult:
    """A launch of several steps (`interface.StepFuture`).

    Args:
        sampled: i32 [steps, S], as `decode_steps` returns it.
    """

    def __init__(self, sampled: jax.Array | np.ndarray, packed: PackedStep):
        self._sampled, self._packed = sampled, packed

    def result(self) -> StepOutput:
        rows, _ = self._packed.flat_rows(NOTHING_LOST)
        ids = np.asarray(self._sampled)[:, rows].T
        there = ids != ENDED
        return StepOutput(token_ids=ids[there].tolist(), counts=there.sum(axis=1).tolist())


def _arrays(found: Logprobs) -> LogprobArrays:
    return LogprobArrays(
        sampled=np.asarray(found.sampled),
        rank=np.asarray(found.rank),
        top_ids=np.asarray(found.top_ids),
        top=np.asarray(found.top),
        chosen=None if found.chosen is None else np.asarray(found.chosen),
    )


class Runner(DeviceMemory[Params, State]):
    """One model on its devices (`interface.ModelRunner`).

    Args:
        params: the model's weights, on the device; None: `restore_weights` reads them.
        reload: reads them anew.
        programs: compiled for the shapes of the weights and of `state`.
        state: shapes, dtypes and shardings of what lives between steps; allocated here.
    """

    def __init__(
        self,
        params: Params | None,
        reload: Callable[[], Params],
        programs: Programs,
        state: State,
        *,
        num_groups: int,
        table_width: int,
    ):
        self._programs, self._buckets = programs, tuple(programs.packings)
        super().__init__(params, reload, programs)
        self._shape = ConstraintShape(programs.config.model.vocab_size)
        self._max_num_seqs = state.tokens.shape[0] - 1
        self._max_scored_tokens = programs.config.max_scored_tokens
        self._rows = RowTable(self._max_num_seqs, num_groups, table_width, programs.config, programs.sample_packing)
        self._no_constraints = jax.device_put(self._shape.empty(self._max_num_seqs), self._sharding)

    def warm_up(self) -> None:
        """Run every program once on padding alone, so that nothing is left for the first request to load or
        allocate. On a CPU programs are loaded when they are compiled, and padding takes as long as tokens: there the
        smallest bucket is enough.
        """
        sample_size = self._programs.sample_packing.size
        on_cpu = all(device.platform == "cpu" for device in self._sharding.device_set)
        for bucket in self._buckets[:1] if on_cpu else self._buckets:
            size = self._programs.packings[bucket].size + sample_size
            hidden, sampling = self._forward(bucket, np.zeros(size, np.int32))
            for full in (True, False):
                self._sample(hidden, sampling, None, bucket.seqs, full)
            self._score(hidden, np.zeros(1 + self._max_scored_tokens, np.int32))
        several = list(self._programs.decode_packings.items())
        for bucket, packing in several[:1] if on_cpu else several:
            buffer = np.zeros(packing.size + sample_size, np.int32)
            fields, sampling = packing.views(buffer[: packing.size]), buffer[packing.size :]
            for name in ("num_decodes", "num_seqs"):
                fields[name][...] = 1
            # one token of the trash row
            fields["query_start"][1:] = 1
            fields["rows"][0], fields["steps"][0], fields["end_ids"][0] = self._max_num_seqs, 1, -1
            self._programs.sample_packing.views(sampling)["num_samples"][...] = 1
            for full in (True, False):
                self._several_steps(bucket, buffer, None, full)
        self._write_tokens(self._max_num_seqs, 0, np.zeros(1, np.int32))
        jax.block_until_ready(self._live())

    def execute(self, scheduled: SchedulerOutput) -> StepResult | SeveralStepsResult:
        if scheduled.num_steps == 1:
            return self.sample(self.forward(scheduled), {})
        self._update_rows(scheduled)
        bucket = pick_bucket(tuple(self._programs.decode_packings), len(scheduled.rows), len(scheduled.rows))
        packed = self._rows.pack_decode_steps(scheduled, self._programs.decode_packings[bucket])
        sampled = self._several_steps(bucket, packed.buffer, packed.constraints, packed.full)
        sampled.copy_to_host_async()
        return SeveralStepsResult(sampled, packed)

    def _update_rows(self, scheduled: SchedulerOutput) -> None:
        for request in scheduled.admitted:
            self._admit(request)
        for row, group, start, blocks in scheduled.new_blocks:
            self._rows.append_blocks(row, group, start, blocks)

    def forward(self, scheduled: SchedulerOutput) -> LaunchedStep:
        self._update_rows(scheduled)
        bucket = self.bucket(scheduled.num_tokens, len(scheduled.rows))
        packed = self._rows.pack(scheduled, self._programs.packings[bucket])
        hidden, sampling = self._forward(bucket, packed.buffer)
        return LaunchedStep(hidden, sampling, packed)

    def sample(self, launched: LaunchedStep, masks: Mapping[int, np.ndarray]) -> StepResult:
        hidden, sampling, packed = launched
        lost = self._rows.restrict(packed, masks) if masks else NOTHING_LOST
        sampled = None
        if count := len(packed.sampled_entries):
            sampled = self._sample(hidden, sampling, packed.constraints, count, packed.full)
        scores = None if packed.targets is None else self._score(hidden, packed.targets)
        return StepResult(sampled, scores, packed, lost, hidden.sampled)

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in."""
        return pick_bucket(self._buckets, num_tokens, num_seqs)

    def _forward(self, bucket: Bucket, buffer: np.ndarray) -> tuple[Hidden, jax.Array]:
        program = self._programs.forward(bucket)
        words = jax.device_put(buffer, self._sharding)
        self._state, *passed_on = program(self._params_for(bucket), self._live(), words)
        hidden, sampling = passed_on
        return hidden, sampling

    def _sample(
        self, hidden: Hidden, sampling: jax.Array, constraints: np.ndarray | None, count: int, full: bool
    ) -> Sampled:
        program, full = self._programs.sampler(count, full)
        state = self._live()
        given = self._given(constraints) if full else None
        tokens, sampled = program(self._head, state.tokens, hidden.sampled, sampling, given)
        self._state = State(cache=state.cache, tokens=tokens)
        return sampled

    def _given(self, constraints: np.ndarray | None) -> jax.Array:
        return self._no_constraints if constraints is None else jax.device_put(constraints, self._sharding)

    def _several_steps(
        self, bucket: Bucket, buffer: np.ndarray, constraints: np.ndarray | None, full: bool
    ) -> jax.Array:
        program, full = self._programs.decode_steps(bucket, full)
        given = self._given(constraints) if full else None
        words = jax.device_put(buffer, self._sharding)
        self._state, sampled = program(self._params_for(bucket), self._live(), words, given)
        return sampled

    def _score(self, hidden: Hidden, targets: np.ndarray) -> Logprobs:
        return self._programs.scorer(self._head, hidden.scored, jax.device_put(targets, self._sharding))

    def _admit(self, request: AdmittedRequest) -> None:
        self._rows.admit(request)
        if request.num_computed_tokens and self._rows.needs_history(request):
            self._write_tokens(request.row, 0, np.asarray(request.token_ids[: request.num_computed_tokens], np.int32))

    def _write_tokens(self, row: int, position: int, ids: np.ndarray) -> None:
        state = self._live()
        tokens = state.tokens
        for first in range(0, len(ids), WRITE_TOKENS):
            part = ids[first : first + WRITE_TOKENS]
            buffer = np.zeros(3 + WRITE_TOKENS, np.int32)
            buffer[:3] = row, position + first, len(part)
            buffer[3 : 3 + len(part)] = part
            tokens = self._programs.writer(tokens, jax.device_put(buffer, self._sharding))
        self._state = State(cache=state.cache, tokens=tokens)

    def _params_for(self, bucket: Bucket) -> Params | None:
        return self._whole if self._programs.takes_whole_layers(bucket) else self.params

    def _heads(self) -> None:
        self._head = self._whole = None
        if self.params is not None:
            self._head = self._programs.head_params(self.params)
            if any(map(self._programs.takes_whole_layers, (*self._programs.packings, *self._programs.decode_packings))):
                self._whole = with_whole_layers(self.params)

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        super().shutdown()
        self._delete(self._no_constraints)
