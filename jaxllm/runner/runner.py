"""The device side of the engine: takes what the scheduler decided, launches the compiled step, gives back sampled
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.errors import ValidationError
from jaxllm.models.decoder import Params
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.constraints import ConstraintShape
from jaxllm.runner.interface import AdmittedRequest, LogprobArrays, SchedulerOutput, StepOutput
from jaxllm.runner.programs import WRITE_TOKENS, Programs, head_params
from jaxllm.runner.rows import PackedStep, RowTable
from jaxllm.runner.step import Hidden, Sampled, State
from jaxllm.sampling.logprobs import Logprobs


class LaunchedStep(NamedTuple):
    """A step whose forward program is launched, and whose sampler is not."""

    hidden: Hidden
    sampling: jax.Array
    packed: PackedStep
    num_entries: int


class StepResult:
    """A launched step (`interface.StepFuture`)."""

    def __init__(
        self,
        sampled: Sampled | None,
        scores: Logprobs | None,
        packed: PackedStep,
        num_entries: int,
        lost: np.ndarray | None = None,
    ):
        self._sampled, self._scores, self._packed = sampled, scores, packed
        self._num_entries, self._lost = num_entries, lost
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
        entries, sampled = self._packed.sampled_entries, self._sampled
        ids = np.full(self._num_entries, -1, np.int32)
        logprobs = None
        if sampled is not None:
            ids[entries] = np.asarray(sampled.token_ids)[: len(entries)]
            if self._lost is not None:
                ids[self._lost] = -1
            if (found := self._logprobs) is not None:
                logprobs = _arrays(jax.tree.map(lambda x: self._scatter(np.asarray(x)), found))
        return StepOutput(token_ids=ids.tolist(), logprobs=logprobs, prompt_logprobs=self._prompt_logprobs())

    def _prompt_logprobs(self) -> LogprobArrays | None:
        scores, targets = self._scores, self._packed.targets
        if scores is None or targets is None:
            return None
        return _arrays(jax.tree.map(lambda x: np.asarray(x)[: targets[0]], scores))

    def _scatter(self, array: np.ndarray) -> np.ndarray:
        entries = self._packed.sampled_entries
        out = np.zeros((self._num_entries, *array.shape[1:]), array.dtype)
        out[entries] = array[: len(entries)]
        return out


def _arrays(found: Logprobs) -> LogprobArrays:
    return LogprobArrays(
        sampled=np.asarray(found.sampled),
        rank=np.asarray(found.rank),
        top_ids=np.asarray(found.top_ids),
        top=np.asarray(found.top),
        chosen=None if found.chosen is None else np.asarray(found.chosen),
    )


class Runner:
    """One model on its devices (`interface.ModelRunner`).

    Args:
        params: the model's weights, on the device.
        reload: reads them anew.
        programs: compiled for the shapes of the weights and of `state`.
        state: shapes, dtypes and shardings of what lives between steps; allocated here.
    """

    def __init__(
        self,
        params: Params,
        reload: Callable[[], Params],
        programs: Programs,
        state: State,
        *,
        num_groups: int,
        table_width: int,
    ):
        self.params: Params | None = params
        self._reload = reload
        #: whether nobody else holds the weights' arrays, so that they may be deleted
        self._owns_params = True
        #: copies in the host's memory, while the device's are freed
        self._on_host: Params | None = None
        self._programs = programs
        self._sharding = state.tokens.sharding
        self._shape = ConstraintShape(programs.config.model.vocab_size)
        self._max_num_seqs = state.tokens.shape[0] - 1
        self._max_scored_tokens = programs.config.max_scored_tokens
        self._rows = RowTable(self._max_num_seqs, num_groups, table_width, programs.config, programs.sample_packing)
        self._buckets = tuple(programs.packings)
        self._state: State | None = programs.allocate()
        self._head = head_params(params)
        self._no_constraints = jax.device_put(self._shape.empty(self._max_num_seqs), self._sharding)

    def warm_up(self) -> None:
        """Run every program once on padding alone, so that nothing is left for the first request to load or
        allocate.
        """
        sample_size = self._programs.sample_packing.size
        for bucket in self._buckets:
            size = self._programs.packings[bucket].size + sample_size
            hidden, sampling = self._forward(bucket, np.zeros(size, np.int32))
            for full in (True, False):
                self._sample(hidden, sampling, None, bucket.seqs, full)
            self._score(hidden, np.zeros(1 + self._max_scored_tokens, np.int32))
        self._write_tokens(self._max_num_seqs, 0, np.zeros(1, np.int32))
        jax.block_until_ready(self._live())

    def execute(self, scheduled: SchedulerOutput) -> StepResult:
        return self.sample(self.forward(scheduled), {})

    def forward(self, scheduled: SchedulerOutput) -> LaunchedStep:
        for request in scheduled.admitted:
            self._admit(request)
        for row, group, start, blocks in scheduled.new_blocks:
            self._rows.append_blocks(row, group, start, blocks)
        bucket = self.bucket(scheduled.num_tokens, len(scheduled.rows))
        packed = self._rows.pack(scheduled, self._programs.packings[bucket])
        hidden, sampling = self._forward(bucket, packed.buffer)
        return LaunchedStep(hidden, sampling, packed, len(scheduled.rows))

    def sample(self, launched: LaunchedStep, masks: Mapping[int, np.ndarray]) -> StepResult:
        hidden, sampling, packed, num_entries = launched
        lost = self._rows.restrict(packed, masks) if masks else None
        sampled = None
        if count := len(packed.sampled_entries):
            sampled = self._sample(hidden, sampling, packed.constraints, count, packed.full)
        scores = None if packed.targets is None else self._score(hidden, packed.targets)
        return StepResult(sampled, scores, packed, num_entries, lost)

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in."""
        return pick_bucket(self._buckets, num_tokens, num_seqs)

    def _live(self) -> State:
        if self._state is None:
            raise RuntimeError("the engine has been shut down")
        return self._state

    def _forward(self, bucket: Bucket, buffer: np.ndarray) -> tuple[Hidden, jax.Array]:
        program = self._programs.forward(bucket)
        self._state, *passed_on = program(self.params, self._live(), jax.device_put(buffer, self._sharding))
        hidden, sampling = passed_on
        return hidden, sampling

    def _sample(
        self, hidden: Hidden, sampling: jax.Array, constraints: np.ndarray | None, count: int, full: bool
    ) -> Sampled:
        program, full = self._programs.sampler(count, full)
        state = self._live()
        given = None
        if full:
            given = self._no_constraints if constraints is None else jax.device_put(constraints, self._sharding)
        tokens, sampled = program(self._head, state.tokens, hidden.sampled, sampling, given)
        self._state = State(cache=state.cache, tokens=tokens)
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

    def reset(self) -> None:
        """Allocate the state anew: a failed step may have consumed what was donated to it."""
        self._free_state()
        self._state = self._programs.allocate()

    def free_cache(self) -> None:
        """Free the device state; `reset` makes it anew."""
        self._free_state()

    def free_weights(self, *, keep_on_host: bool) -> None:
        """Free the weights' memory on the device, where it is not the host's own."""
        params, sharding = self.params, self._sharding
        on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
        if params is None or (keep_on_host and on_cpu):
            return
        on_host = jax.device_get(params) if keep_on_host else None
        self._delete_params()
        self._on_host = on_host

    def restore_weights(self) -> None:
        """Undo `free_weights`: from the host, or from where they were first read."""
        if self.params is None:
            params = self._reload() if self._on_host is None else jax.device_put(self._on_host, self._sharding)
            self._use(params, owned=True)

    def reload_weights(self) -> None:
        """Read the weights anew from where they were first read."""
        self.free_weights(keep_on_host=False)
        self.restore_weights()

    def set_params(self, params: Params) -> None:
        """Use other weights: a tree of the same structure, shapes and dtypes.

        Raises:
            ValidationError: it differs; the text names the first difference.
        """
        if self.params is None:
            raise RuntimeError("the weights sleep: call wake_up() first")
        ours, theirs = (dict(jax.tree.leaves_with_path(tree)) for tree in (self.params, params))
        for path in {**ours, **theirs}:
            old, new = ours.get(path), theirs.get(path)
            same = old is not None and new is not None and old.shape == np.shape(new) and old.dtype == new.dtype
            if not same:
                shown = [None if x is None else f"{x.dtype}{list(np.shape(x))}" for x in (old, new)]
                raise ValidationError(f"params{jax.tree_util.keystr(path)} must be {shown[0]}, got {shown[1]}.")
        self._use(jax.device_put(params, self._sharding), owned=False)

    def _use(self, params: Params, *, owned: bool) -> None:
        self.params, self._head = params, head_params(params)
        self._owns_params, self._on_host = owned, None

    def _delete_params(self) -> None:
        if self._owns_params:
            self._delete(self.params)
        self.params = self._head = self._on_host = None

    @staticmethod
    def _delete(tree) -> None:
        for array in jax.tree.leaves(tree):
            if not array.is_deleted():
                array.delete()

    def _free_state(self) -> None:
        if self._state is not None:
            self._delete(self._state)
            self._state = None

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        self._free_state()
        self._delete(self._no_constraints)
        self._delete_params()
