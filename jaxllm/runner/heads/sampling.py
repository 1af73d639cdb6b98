"""The head of a model that generates: logits at the wanted positions, and tokens sampled from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.engine.step import AdmittedRequest, SchedulerOutput, StepFuture
from jaxllm.models.adapters import Stacks, with_adapters, with_own_heads
from jaxllm.models.params import Params, draft_params
from jaxllm.multimodal.items import EncoderInput
from jaxllm.parallel.processes import is_distributed, put_whole
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.heads.draft_steps import DraftParams, DraftSteps
from jaxllm.runner.heads.embeddings import Embeddings
from jaxllm.runner.heads.head import Head
from jaxllm.runner.heads.pictures import Pictures
from jaxllm.runner.heads.sampling_programs import WRITE_TOKENS, SamplingPrograms
from jaxllm.runner.heads.sampling_rows import NOTHING_LOST, PackedStep, SamplingRows
from jaxllm.runner.heads.sampling_step import Hidden, Sampled, State
from jaxllm.runner.heads.step_results import DecodeStepsResult, DraftStepsResult, StepResult
from jaxllm.runner.heads.weight_forms import Form
from jaxllm.runner.rows import Rows
from jaxllm.sampling.logprobs import Logprobs
from jaxllm.speculative.adaptive import ONE
from jaxllm.speculative.credit import INITIAL, Credit
from jaxllm.speculative.draft_model import ModelDrafter
from jaxllm.speculative.prices import CheckPrices, LaunchClock
from jaxllm.speculative.reading import Prices, Reading
from jaxllm.speculative.suffix import KeptOutputs


class LaunchedStep(NamedTuple):
    """A step whose forward program is launched, and whose sampler is not."""

    hidden: Hidden
    sampling: jax.Array
    packed: PackedStep
    #: as of `StepResult`
    learn: Callable[[bool], None] | None = None


class SamplingHead(Head[Params, State]):
    """Samples, scores what is known, and does several decode steps in one launch."""

    def __init__(self, programs: SamplingPrograms):
        self.programs: SamplingPrograms = programs
        self._sharding = programs.sharding
        self._rows = SamplingRows(programs)
        self._embeddings, self._pictures = Embeddings(programs), Pictures(programs)
        self._kept = KeptOutputs(programs.num_kept_tokens, programs.max_kept_outputs)
        self._clock = LaunchClock()
        # processes that tell one program different prices would not come together again
        self._learns = not is_distributed()
        costs = programs.check_costs if self._learns else {}
        lengths = programs.adaptive.lengths
        self._prices = {seqs: CheckPrices(steps, lengths) for seqs, steps in costs.items()}
        #: rows of launches with drafts, of whose tokens a model that drafts may have passed over some
        self._resting: set[int] = set()
        #: what all drafts of the engine may still cost, beside each request's own
        self._credit = Credit()
        self._reading: Reading | None = None
        if programs.reading_costs is not None:
            rests = isinstance(programs.drafter, ModelDrafter) and programs.drafter.rests
            self._reading = Reading(programs.reading_costs, self._credit, can_be_late=rests)
        self._params: Params | None = None
        #: the weights in the forms in which programs take them, and as samplers do
        self._forms: dict[Form, Params] = {}
        #: the same with adapters
        self._adapted: dict[Form, Params] = {}
        self._adapters: tuple[Stacks, ...] = ()
        self._head: Params | None = None
        rows = programs.replicas * programs.max_num_seqs
        constraints = ConstraintShape(programs.config.model.vocab_size).empty(rows)
        self._no_constraints = put_whole(constraints, self._sharding)
        #: the same of each position, by the launches' buckets
        self._no_draft_constraints: dict[Bucket, jax.Array] = {}

    def use(self, params: Params | None) -> None:
        programs = self.programs
        self._params, self._forms, self._head, self._pictures.params = params, {}, None, None
        if params is not None:
            # few arguments make quick launches
            self._pictures.params, params = params.vision, dataclasses.replace(params, vision=None)
            self._head = programs.head_params(params)
            self._forms = programs.forms(params)
        self._adapt()

    def use_adapters(self, adapters: Sequence[Stacks]) -> None:
        self._adapters = tuple(adapters)
        self._adapt()

    def _adapt(self) -> None:
        self._adapt_head()
        for adapters in self._adapters:
            self._adapted = {form: with_adapters(params, adapters) for form, params in self._forms.items()}

    def _adapt_head(self) -> None:
        """Of a pipeline the last stage has it."""
        if self._head is not None and self._adapters:
            self._head = with_own_heads(self._head, self._adapters[-1])

    def admit(self, state: State, request: AdmittedRequest) -> State:
        self._resting.discard(request.row)
        if self._reading is not None:
            computed, known = request.num_computed_tokens, len(request.token_ids)
            self._reading.admit(request.row, known - computed, request.max_total_tokens - known)
        self._rows.admit(request)
        return self._write_tokens(state, request.row, self._rows.history(request))

    def keep_outputs(self, state: State, outputs: Sequence[list[int]]) -> State:
        for ids in outputs:
            for first, values in self._kept.add(ids):
                state = self._write_outputs(state, first, np.asarray(values, np.int32))
        return state

    def forget_outputs(self) -> None:
        self._kept.clear()

    def decode_steps(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> tuple[State, StepFuture]:
        if scheduled.num_drafts:
            return self._draft_steps(state, scheduled, rows)
        packings, num_seqs = self.programs.decode_packings, len(scheduled.rows)
        bucket = pick_bucket(tuple(packings), num_seqs, num_seqs, adapters=scheduled.uses_adapters)
        packed = self._rows.pack_decode_steps(scheduled, rows, packings[bucket])
        self._clock.launched()
        state, found = self._decode_steps(state, bucket, packed.buffer, packed.constraints, packed.full)
        sampled, *loads = found if isinstance(found, tuple) else (found,)
        for array in (sampled, *loads):
            array.copy_to_host_async()
        return state, DecodeStepsResult(sampled, packed, tuple(loads))

    def _draft_steps(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> tuple[State, StepFuture]:
        packings, num_seqs = self.programs.draft_packings, len(scheduled.rows)
        bucket = pick_bucket(tuple(packings), num_seqs, num_seqs, adapters=scheduled.uses_adapters)
        # of this engine's own numbers: processes that decide differently would not come together again
        given_up, passed_over, always = None, None, not self._learns
        if self._reading is not None:
            given_up = self._reading.given_up(scheduled.rows, always=always)
            passed_over = self._reading.take_passed_over(scheduled.rows)
            self._resting.update(row for row, gone in zip(scheduled.rows, given_up, strict=True) if not gone)
        first_credit = min(max(self._credit.steps, 0.0), INITIAL)
        if always:
            first_credit = INITIAL
        elif self._reading is not None:
            first_credit = self._reading.first_credit(scheduled.rows)
        packing = packings[bucket]
        packed = self._rows.pack_decode_steps(
            scheduled, rows, packing, given_up=given_up, passed_over=passed_over, first_credit=first_credit
        )
        requests = [] if self._reading is None else self._reading.requests(scheduled.rows)
        may_check = always or bool(scheduled.checked) or self._prices[bucket.seqs].launch()
        if not may_check:
            packing.views(packed.buffer[: packing.size])["most_drafts"][...] = 0
        launch = self._clock.launched()
        state, found = self._check_drafts(state, bucket, packed.buffer, packed.constraints, packed.full)

        def learn(kinds: np.ndarray, waited: bool) -> None:
            extra = self.programs.check_costs[bucket.seqs] / ONE
            self._credit.grow(int(kinds.sum()))
            self._credit.win(float(np.asarray(found.accepted).sum() / num_seqs - kinds[1:] @ extra))
            if self._reading is not None:
                places, _ = packed.flat_rows(NOTHING_LOST)
                arrays = found.counts, found.drafted, found.accepted
                counts, drafted, accepted = (np.asarray(array)[..., places] for array in arrays)
                single = int(kinds[0])
                self._reading.learn(requests, counts.tolist(), drafted, accepted, single, may_check=may_check)
            seconds = self._clock.seconds(launch, waited=waited)
            if seconds is not None:
                self._prices[bucket.seqs].saw(seconds, kinds.tolist())

        return state, DraftStepsResult(found, packed, learn if self._learns else None)

    def _check_drafts(
        self, state: State, bucket: Bucket, buffer: np.ndarray, constraints: np.ndarray | None, full: bool
    ) -> tuple[State, DraftSteps]:
        program, full = self.programs.draft_steps(bucket, full)
        given = self._draft_constraints(bucket, constraints) if full else None
        forms, weights = self.programs.check_forms(bucket), self._adapted if bucket.adapters else self._forms
        params = DraftParams(weights[self.programs.form(bucket)], tuple(weights[form] for form in forms))
        return program(params, state, put_whole(buffer, self._sharding), given)

    def _prices_of(self, num_seqs: int) -> Prices:
        """Of checks of so many sequences, or of the most that have any."""
        costs = self.programs.check_costs
        seqs = next((seqs for seqs in costs if seqs >= num_seqs), max(costs))
        return Prices(self.programs.adaptive.lengths, costs[seqs] / ONE)

    def _catch_up(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> State:
        """Let a model that drafts read what it has passed over of those who take part in a step that it reads."""
        reading = self._reading
        assert reading is not None
        late = [
            entry
            for entry, row in enumerate(scheduled.rows)
            if reading.is_read(row) and (row in self._resting or reading.passed_over(row))
        ]
        packings = self.programs.catch_up_packings
        most = next(reversed(packings)).seqs
        for first in range(0, len(late), most):
            some, step = late[first : first + most], SchedulerOutput.empty(scheduled.step)
            for name in ("rows", "starts", "counts", "wanted"):
                getattr(step, name).extend(getattr(scheduled, name)[entry] for entry in some)
            self._resting.difference_update(step.rows)
            bucket = pick_bucket(tuple(packings), len(some), len(some))
            passed_over = reading.take_passed_over(step.rows)
            buffer = self._rows.pack_late(step, rows, packings[bucket], passed_over)
            state = self._read_late(state, bucket, buffer)
        return state

    def _read_late(self, state: State, bucket: Bucket, buffer: np.ndarray) -> State:
        params = self._forms[self.programs.check_forms(bucket)[-1]]
        self._clock.launched()
        return self.programs.catch_up(bucket)(draft_params(params), state, put_whole(buffer, self._sharding))

    def _draft_constraints(self, bucket: Bucket, constraints: np.ndarray | None) -> jax.Array:
        if constraints is not None:
            return put_whole(constraints, self._sharding)
        if bucket not in self._no_draft_constraints:
            shape, drafter = ConstraintShape(self.programs.config.model.vocab_size), self.programs.drafter
            assert drafter is not None
            nothing = shape.empty((1 + drafter.num_drafts) * bucket.seqs)
            nothing = nothing.reshape(-1, bucket.seqs, shape.row_size)
            self._no_draft_constraints[bucket] = put_whole(nothing, self._sharding)
        return self._no_draft_constraints[bucket]

    def encode(self, state: State, inputs: Sequence[EncoderInput]) -> State:
        return dataclasses.replace(state, encoded=self._pictures.encode(state.encoded, inputs))

    def forward(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> tuple[State, LaunchedStep]:
        size = scheduled.num_tokens, len(scheduled.rows)
        bucket = self.programs.bucket(*size, adapters=scheduled.uses_adapters)
        packing = self.programs.packings[bucket]
        packed, reads = self._rows.pack(scheduled, rows, packing), False
        if self._reading is not None:
            reads = self._reading.reads(
                scheduled.rows,
                scheduled.counts,
                self._prices_of(len(scheduled.rows)),
                may_draft=scheduled.may_draft,
                always=not self._learns,
            )
            packing.views(packed.buffer[: packing.size])["drafter_reads"][...] = reads
            if not reads:
                self._resting.difference_update(row for row in scheduled.rows if not self._reading.is_read(row))
            else:
                state = self._catch_up(state, scheduled, rows)
        launch, learn = self._clock.launched(), None
        state, hidden, sampling = self._forward(state, bucket, packed.buffer, packed.embeddings)
        if self._reading is not None and self._learns:
            learn = partial(self._learn_reading, launch, scheduled.num_tokens, reads)
        return state, LaunchedStep(hidden, sampling, packed, learn)

    def _learn_reading(self, launch: tuple[int, float], num_tokens: int, was_read: bool, waited: bool) -> None:
        seconds, step = self._clock.seconds(launch, waited=waited), next(iter(self._prices.values())).seconds
        if self._reading is not None and seconds is not None and step is not None:
            self._reading.saw(num_tokens, seconds / step, was_read=was_read)

    def sample(self, state: State, launched: LaunchedStep, masks: Mapping[int, np.ndarray]) -> tuple[State, StepResult]:
        hidden, sampling, packed, learn = launched
        lost = self._rows.restrict(packed, masks) if masks else NOTHING_LOST
        sampled = None
        if count := len(packed.sampled_entries):
            state, sampled = self._sample(state, hidden, sampling, packed.constraints, count, packed.full)
        scores = None if packed.targets is None else self._score(hidden, packed.targets)
        return state, StepResult(sampled, scores, packed, lost, hidden.sampled, self._loads(launched), learn)

    def _loads(self, launched: LaunchedStep) -> tuple[jax.Array, ...]:
        """How many tokens each expert got, of each stage that has any."""
        load = launched.hidden.load
        return () if load is None else (load,)

    def warm_up(self, state: State, *, smallest: bool) -> State:
        programs = self.programs
        sample_size, trash = programs.sample_packing.size, programs.max_num_seqs
        replicas = programs.replicas
        for bucket in programs.buckets[: 1 if smallest else None]:
            buffer = np.zeros(replicas * (programs.packings[bucket].size + sample_size), np.int32)
            state, hidden, sampling = self._forward(state, bucket, buffer)
            for full in (True, False):
                state, _ = self._sample(state, hidden, sampling, None, bucket.seqs, full)
            self._score(hidden, np.zeros(replicas * programs.num_target_words, np.int32))
        for bucket, packing in list(programs.decode_packings.items())[: 1 if smallest else None]:
            buffer = np.zeros(packing.size + sample_size, np.int32)
            fields, sampling = packing.views(buffer[: packing.size]), buffer[packing.size :]
            for name in ("num_decodes", "num_seqs"):
                fields[name][...] = 1
            # one token of the trash row
            fields["query_start"][1:] = 1
            fields["rows"][0], fields["steps"][0], fields["end_ids"][0] = trash, 1, -1
            programs.sample_packing.views(sampling)["num_samples"][...] = 1
            for full in (True, False):
                state, _ = self._decode_steps(state, bucket, buffer, None, full)
        for bucket, packing in list(programs.draft_packings.items())[: 1 if smallest else None]:
            # no sequence goes on
            buffer = np.zeros(packing.size + sample_size, np.int32)
            for full in (True, False):
                state, _ = self._check_drafts(state, bucket, buffer, None, full)
        for bucket, packing in list(programs.catch_up_packings.items())[: 1 if smallest else None]:
            state = self._read_late(state, bucket, np.zeros(packing.size, np.int32))
        state = self._warm_up_pictures(state, smallest=smallest)
        if programs.max_kept_outputs:
            state = self._write_outputs(state, 0, np.zeros(1, np.int32))
        return self._write_tokens(state, trash, np.zeros(1, np.int32))

    def _warm_up_pictures(self, state: State, *, smallest: bool) -> State:
        return dataclasses.replace(state, encoded=self._pictures.warm_up(state.encoded, smallest=smallest))

    def free(self) -> None:
        self._embeddings.free()
        for array in (self._no_constraints, *self._no_draft_constraints.values()):
            if not array.is_deleted():
                array.delete()

    def _forward(
        self, state: State, bucket: Bucket, buffer: np.ndarray, vectors: np.ndarray | None = None
    ) -> tuple[State, Hidden, jax.Array]:
        words, embeddings = put_whole(buffer, self._sharding), self._embeddings.argument(bucket, vectors)
        return self.programs.forward(bucket)(self._params_for(bucket), state, words, *embeddings)

    def _sample(
        self,
        state: State,
        hidden: Hidden,
        sampling: jax.Array,
        constraints: np.ndarray | None,
        count: int,
        full: bool,
    ) -> tuple[State, Sampled]:
        program, full = self.programs.sampler(count, full)
        given = self._given(constraints) if full else None
        tokens, sampled = program(self._head, state.tokens, hidden.sampled, sampling, given)
        return dataclasses.replace(state, tokens=tokens), sampled

    def _given(self, constraints: np.ndarray | None) -> jax.Array:
        return self._no_constraints if constraints is None else put_whole(constraints, self._sharding)

    def _decode_steps(
        self, state: State, bucket: Bucket, buffer: np.ndarray, constraints: np.ndarray | None, full: bool
    ) -> tuple[State, jax.Array | tuple[jax.Array, jax.Array]]:
        program, full = self.programs.decode_steps(bucket, full)
        given = self._given(constraints) if full else None
        return program(self._params_for(bucket), state, put_whole(buffer, self._sharding), given)

    def _score(self, hidden: Hidden, targets: np.ndarray) -> Logprobs:
        return self.programs.scorer(self._head, hidden.scored, put_whole(targets, self._sharding))

    def _write_tokens(self, state: State, row: int, ids: np.ndarray, replica: int = 0) -> State:
        """Put tokens from a row's first position on into `State.tokens`, without computing them.

        Args:
            replica: of those that step together, the one whose row it is.
        """
        if not len(ids):
            # a profile counts programs that are asked for
            return state
        tokens = self._written(self.programs.writer, state.tokens, row, 0, ids, replica)
        return dataclasses.replace(state, tokens=tokens)

    def _write_outputs(self, state: State, first: int, ids: np.ndarray) -> State:
        """Put numbers into `State.outputs`."""
        outputs = self._written(self.programs.output_writer, state.outputs, 0, first, ids)
        return dataclasses.replace(state, outputs=outputs)

    def _written(self, writer: Any, array: Any, row: int, start: int, ids: np.ndarray, replica: int = 0) -> jax.Array:
        for first in range(0, len(ids), WRITE_TOKENS):
            part = ids[first : first + WRITE_TOKENS]
            buffers = np.zeros((self.programs.replicas, 3 + WRITE_TOKENS), np.int32)
            buffers[replica, :3] = row, start + first, len(part)
            buffers[replica, 3 : 3 + len(part)] = part
            array = writer(array, put_whole(buffers.reshape(-1), self._sharding))
        return array

    def _params_for(self, bucket: Bucket) -> Params | None:
        return (self._adapted if bucket.adapters else self._forms).get(self.programs.form(bucket))
