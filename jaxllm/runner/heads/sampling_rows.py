"""What sampling must know of each running request, kept by row; a step's part of it goes into its buffer, behind what
every forward pass reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from jaxllm.api.logits_processor import extra_arg_defaults, hosts
from jaxllm.api.torch_logits_processor import REQUEST, RowRequests
from jaxllm.engine.step import MAX_END_TOKEN_IDS, AdmittedRequest, SchedulerOutput
from jaxllm.runner.heads.constraints import ConstraintShape, RowConstraints
from jaxllm.runner.heads.sampling_fields import BEGINS, FLOATS, GIVES_UP, INTS
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.packing import Packing
from jaxllm.runner.rows import Rows, Sequences
from jaxllm.speculative.adaptive import ONE
from jaxllm.speculative.credit import INITIAL


@dataclasses.dataclass(slots=True)
class PackedStep:
    """What one step uploads, and how to read what it returns."""

    buffer: np.ndarray  # int32, `forward_packing`'s fields, then `sample_packing`'s
    constraints: np.ndarray | None  # int32 [max_num_seqs, row_size]; None: no row needs any
    full: bool  # some row needs more than its most likely token
    want_logprobs: bool
    want_chosen: bool  # some row has `logprob_token_ids`
    #: of the SchedulerOutput
    num_entries: int
    #: index of the SchedulerOutput's entry that each sampled row belongs to
    sampled_entries: np.ndarray
    #: int32 [1 + max_scored_tokens], as `step.score_step` takes it; None: nothing is scored
    targets: np.ndarray | None
    #: positions that each entry has scored; [] where nothing is
    scored_counts: list[int]
    #: [tokens of the bucket, hidden size], of prompts that bring vectors; None: no token of the step has one
    embeddings: np.ndarray | None = None
    #: tells what processors on the host raised in the step, once it is done: entry -> error
    errors: Callable[[], Mapping[int, str]] = dict
    #: masked row -> its place in `constraints`
    masked: dict[int, int] = dataclasses.field(default_factory=dict)

    def flat_rows(self, lost: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The sampled rows in the order of their entries, and how many of them each entry has, 0 or 1.

        Args:
            lost: int, places of rows that no token was left to; they are left out.
        """
        rows = np.argsort(self.sampled_entries)
        if len(lost):
            rows = rows[~np.isin(rows, lost)]
        counts = np.zeros(self.num_entries, np.int32)
        counts[self.sampled_entries[rows]] = 1
        return rows, counts.tolist()


NOTHING_LOST = np.zeros(0, np.int64)


class SamplingRows:
    """Sampling parameters of all rows of an engine with these programs, and its steps' buffers."""

    def __init__(self, programs: SamplingPrograms):
        config, max_num_seqs = programs.config, programs.max_num_seqs
        self._shape = ConstraintShape(config.model.vocab_size)
        self._max_scored_tokens, self._num_target_words = config.max_scored_tokens, programs.num_target_words
        #: of each row, one more than the slot of its adapter; None: samplers need not know it
        self._adapters = np.zeros(max_num_seqs, np.int32) if programs.has_own_heads else None
        self._sample_packing = programs.sample_packing
        self._check_costs = programs.check_costs
        #: of a launch with drafts, of one request
        self._most_tokens = 0
        if programs.drafter is not None:
            self._most_tokens = programs.num_draft_steps * (1 + programs.drafter.num_drafts)
        self._has_processors, self._has_drafts = bool(config.processors), programs.drafter is not None
        self._extra_defaults = extra_arg_defaults(config.processors)
        self._extra_args = np.zeros((max_num_seqs, len(self._extra_defaults)), np.float32)
        self._on_host = RowRequests(hosts(config.processors)) if REQUEST in self._extra_defaults else None
        # rows in the buffer's order, so that one gather packs them all
        self._parameters = np.zeros((len(FLOATS) + len(INTS), max_num_seqs), np.int32)
        named = dict(zip((*FLOATS, *INTS), self._parameters, strict=True))
        self._floats = {name: named[name].view(np.float32) for name in FLOATS}
        self._ints = {name: named[name] for name in INTS}
        self._logprobs = np.zeros(max_num_seqs, bool)
        self._full = np.zeros(max_num_seqs, bool)
        self._end_ids = np.full((max_num_seqs, MAX_END_TOKEN_IDS), -1, np.int32)
        #: rows whose requests have had no launch with drafts
        self._begins = np.zeros(max_num_seqs, bool)
        self._constraints: dict[int, RowConstraints] = {}
        self._full_mask = self._shape.full_mask()

    def admit(self, request: AdmittedRequest) -> None:
        row, params = request.row, request.params
        greedy = params.is_greedy
        for name in FLOATS:
            self._floats[name][row] = getattr(params, name)
        if greedy:
            self._floats["temperature"][row] = 0.0
        # more than any vocabulary has are all of it
        self._ints["top_k"][row] = min(max(params.top_k, 0), 2**31 - 1)
        self._ints["seed_low"][row], self._ints["seed_high"][row] = _words(request.seed)
        self._ints["prompt_length"][row] = request.num_prompt_tokens
        if self._adapters is not None:
            self._adapters[row] = 1 + request.adapter_slot
        self._logprobs[row] = params.num_logprobs is not None
        given = params.extra_args or {}
        if self._on_host is not None:
            given = {**given, REQUEST: self._on_host.admit(row, params)}
        self._extra_args[row] = [given.get(name, default) for name, default in self._extra_defaults.items()]
        # a request with more of them does not take part in launches of several steps
        ends = list(request.end_token_ids)[:MAX_END_TOKEN_IDS]
        self._end_ids[row] = ends + [-1] * (MAX_END_TOKEN_IDS - len(ends))
        self._begins[row] = True
        self._constraints.pop(row, None)
        if RowConstraints.needed(request):
            self._constraints[row] = RowConstraints(self._shape, request)
        self._full[row] = not greedy or self._logprobs[row] or row in self._constraints
        self._full[row] |= self._sampler_looks_back(request)

    def needs_history(self, request: AdmittedRequest) -> bool:
        """Whether somebody looks at the request's earlier tokens on the device."""
        return self._has_drafts or self._sampler_looks_back(request)

    def _sampler_looks_back(self, request: AdmittedRequest) -> bool:
        if self._has_processors:
            return True
        return request.params.has_penalties or any(len(words) > 1 for words in request.bad_words)

    def history(self, request: AdmittedRequest) -> np.ndarray:
        """int32, the first tokens of a request that its sampler looks at, and that no step will bring."""
        count = request.num_computed_tokens if self.needs_history(request) else 0
        return np.asarray(request.token_ids[:count], np.int32)

    def pack(self, step: SchedulerOutput, rows: Rows, packing: Packing) -> PackedStep:
        """Fill the buffers of a step; `packing` is its bucket's."""
        # never reused: the device may read it in place
        buffer = np.zeros(packing.size + self._sample_packing.size, np.int32)
        fields = packing.views(buffer[: packing.size])
        found = rows.pack(step, fields)
        order, row, _, end, lengths = found
        # a wanted position is sampled where nobody knows the token behind it, which is so for the last ones only
        wanted = np.asarray(step.wanted, np.int32)[order]
        samples = (wanted > 0) & (lengths >= rows.known[row])
        scored, targets = np.zeros_like(wanted) if step.goes_on_alone else wanted - samples, None
        scored_counts: list[int] = []
        if scored.any():
            targets, scored_counts = self._targets(rows.tokens, fields["scored_tokens"], found, wanted, scored)
        if not samples.all():
            sampled = np.flatnonzero(samples)
            order, row, end, lengths = order[sampled], row[sampled], end[sampled], lengths[sampled]
        fields["sampled_tokens"][: len(end)] = end - 1

        full = bool(step.masked_rows) or bool(self._full[row].any())
        packed = PackedStep(buffer, None, full, False, False, len(step.rows), order, targets, scored_counts)
        packed.embeddings = rows.embeddings(found, len(fields["token_ids"]))
        if self._on_host is not None:
            ends = [start + count for start, count in zip(step.starts, step.counts, strict=True)]
            packed.errors = partial(self._on_host.failures, self._on_host.of(step.rows), ends)
        if len(row):
            fields = self._sample_packing.views(buffer[packing.size :])
            lowest = lengths
            if step.resumes:
                # the device may stand as far behind as a launch brings tokens
                lowest = lengths - self._most_tokens * np.asarray(step.resumes, np.int32)[order]
            self._pack_sampling(packed, fields, row, lengths, lowest if step.goes_on_alone else None)
            self._add_masks(packed, fields, row, step.masked_rows)
        return packed

    def pack_decode_steps(
        self,
        step: SchedulerOutput,
        rows: Rows,
        packing: Packing,
        *,
        given_up: Sequence[bool] | None = None,
        passed_over: Sequence[int] | None = None,
        first_credit: float = INITIAL,
    ) -> PackedStep:
        """`pack` for a launch of several steps, or with drafts.

        Args:
            packing: `decode_packing` or `draft_packing` of its bucket.
            given_up: of each entry, whether a model has not read all that it would need to draft for it.
            passed_over: of each entry, its latest tokens that this one is still to read, beside those that the device
                knows of.
            first_credit: of requests without any launch with drafts, in steps.
        """
        packed = self.pack(step, rows, packing)
        fields, order = packing.views(packed.buffer[: packing.size]), packed.sampled_entries
        fields["steps"][: len(order)] = np.asarray(step.counts, np.int32)[order]
        fields["end_ids"][: len(order)] = self._end_ids[np.asarray(step.rows)[order]]
        if step.num_drafts:
            taking_part = np.asarray(step.rows)[order]
            fields["most_drafts"][...] = step.num_drafts
            fields["check_costs"][...] = self._check_costs[len(fields["steps"])]
            fields["first_credit"][...] = round(first_credit * ONE)
            fields["resumes"][: len(order)] = np.asarray(step.resumes)[order]
            fields["begins"][: len(order)] = self._begins[taking_part] * BEGINS
            if given_up is not None:
                fields["begins"][: len(order)] |= np.asarray(given_up, np.int32)[order] * GIVES_UP
            if passed_over is not None:
                fields["passed_over"][: len(order)] = np.asarray(passed_over, np.int32)[order]
            self._begins[taking_part] = False
            fields["num_given"][...] = -1
            if packed.constraints is not None:
                seqs, width = len(fields["steps"]), 1 + fields["given"].shape[1]
                packed.constraints = np.tile(packed.constraints[:seqs], (width, 1, 1))
            for row, (drafts, masks) in step.checked.items():
                place = packed.masked[row]
                position = step.starts[packed.sampled_entries[place]] + 1
                count = self._restrict_drafts(packed, row, position, masks)
                if count:
                    fields["num_given"][place] = count - 1
                    fields["given"][place, : count - 1] = drafts[: count - 1]
                else:  # nothing may come: it does nothing
                    fields["num_given"][place] = fields["steps"][place] = 0
        return packed

    def pack_late(self, step: SchedulerOutput, rows: Rows, packing: Packing, passed_over: Sequence[int]) -> np.ndarray:
        """The buffer of a launch that reads what was passed over.

        Args:
            packing: `catch_up_packing` of its bucket.
            passed_over: as of `pack_decode_steps`.
        """
        buffer = np.zeros(packing.size, np.int32)
        fields = packing.views(buffer)
        found = rows.pack(step, fields)
        fields["begins"][: len(found.rows)] = self._begins[found.rows] * BEGINS
        fields["passed_over"][: len(found.rows)] = np.asarray(passed_over, np.int32)[found.order]
        return buffer

    def _restrict_drafts(self, packed: PackedStep, row: int, position: int, masks: np.ndarray) -> int:
        """Constrain the positions of a step from `position` on; returns how many of them some token is left to."""
        own, place = self._constraints.get(row), packed.masked[row]
        assert packed.constraints is not None
        for index, mask in enumerate(masks):
            words = packed.constraints[index, place]
            if own is not None:
                own.write(words, position + index, and_behind=False)
            if not words[self._shape.mask.start - 1]:
                words[self._shape.mask.start - 1] = 1
                words[self._shape.mask] = self._full_mask
            words[self._shape.mask] &= mask
            if not words[self._shape.mask].any():
                return index
        return len(masks)

    def _add_masks(self, packed: PackedStep, fields, rows: np.ndarray, masked: frozenset[int]) -> None:
        """Make room for the masks that `restrict` brings."""
        if not masked:
            return
        fields["any_mask"][...] = 1
        if packed.constraints is None:
            packed.constraints = self._shape.empty(len(fields["rows"]))
        for i, row in enumerate(rows.tolist()):
            if row not in masked:
                continue
            packed.masked[row] = i
            words = packed.constraints[i]
            if not words[self._shape.mask.start - 1]:
                words[self._shape.mask.start - 1] = 1
                words[self._shape.mask] = self._full_mask

    def restrict(self, packed: PackedStep, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """Add the engine's masks to a step's constraints; returns the places of rows that no token is left to."""
        lost = []
        for row, mask in masks.items():
            assert packed.constraints is not None
            words = packed.constraints[packed.masked[row], self._shape.mask]
            words &= mask
            if not words.any():
                lost.append(packed.masked[row])
        return np.asarray(lost, np.int64)

    def _pack_sampling(
        self, packed: PackedStep, fields, rows: np.ndarray, positions: np.ndarray, lowest: np.ndarray | None
    ) -> None:
        """
        Args:
            lowest: of launches that go on alone, the first positions that they may sample.
        """
        count = len(rows)
        fields["num_samples"][...] = count
        fields["rows"][:count] = rows
        fields["positions"][:count] = positions
        fields.together((*FLOATS, *INTS))[:, :count] = self._parameters[:, rows]
        if self._adapters is not None:
            fields["adapters"][:count] = self._adapters[rows]
        if self._extra_defaults:
            fields["extra_args"][:count] = self._extra_args[rows]
        if packed.full:
            packed.want_logprobs = bool(self._logprobs[rows].any())
            fields["want_logprobs"][...] = packed.want_logprobs
            packed.constraints = self._flags(packed, fields, rows, positions if lowest is None else lowest, lowest)

    def _targets(
        self, known: Sequence[np.ndarray], tokens: np.ndarray, found: Sequences, wanted: np.ndarray, scored: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """The step's scored tokens, entry after entry, into `tokens`; returns what follows each and each entry's count.

        Args:
            known: tokens of each row.
            wanted, scored: int [n], of each sequence.
        """
        targets = np.zeros(self._num_target_words, np.int32)
        counts = np.zeros_like(scored)
        counts[found.order] = scored
        first, position, done = (found.end - wanted).tolist(), (found.lengths - wanted + 1).tolist(), 0
        for seq in np.argsort(found.order).tolist():
            count = int(scored[seq])
            tokens[done : done + count] = np.arange(first[seq], first[seq] + count)
            follows = known[int(found.rows[seq])][position[seq] : position[seq] + count]
            targets[1 + done : 1 + done + count] = follows
            if self._adapters is not None:
                behind = 1 + self._max_scored_tokens
                targets[behind + done : behind + done + count] = self._adapters[int(found.rows[seq])]
            done += count
        targets[0] = done
        return targets, counts.tolist()

    def _flags(self, packed: PackedStep, fields, rows, positions, lowest) -> np.ndarray | None:
        """Set the flags of what these rows need; returns the constraint buffer when one has constraints."""
        get = {name: self._floats[name][rows] for name in FLOATS}
        random = get["temperature"] > 0
        truncated = (self._ints["top_k"][rows] > 0) | (get["top_p"] < 1) | (get["min_p"] > 0)
        penalised = (get["repetition_penalty"] != 1) | (get["presence_penalty"] != 0) | (get["frequency_penalty"] != 0)
        fields["any_random"][...] = random.any()
        fields["any_truncation"][...] = (random & truncated).any()
        fields["any_penalty"][...] = penalised.any()
        if not self._constraints:
            return None
        buffer = None
        for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            constraints = self._constraints.get(row)
            if constraints is None:
                continue
            if not constraints.needs(position):
                continue
            masks = constraints.masks(position)
            if buffer is None:
                buffer = self._shape.empty(len(fields["rows"]))
            constraints.write(buffer[i], position, and_behind=lowest is not None)
            fields["any_bias"][...] |= constraints.has_bias
            fields["any_mask"][...] |= masks
            fields["any_bad_words"][...] |= constraints.has_bad_words
            packed.want_chosen |= constraints.has_logprob_ids
        return buffer


def _words(seed: int) -> tuple[int, int]:
    """(low, high) 32-bit words of a 64-bit seed, as the values of int32."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - ((low & 0x80000000) << 1), high - ((high & 0x80000000) << 1)
