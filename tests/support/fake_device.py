"""A device without a model: it remembers what every cache slot holds, and refuses a step that would read anything else.

Its model is a hash: a token's keys and values are the hash of its whole prefix, and the next token is that hash
modulo the vocabulary. So a wrong block, a stale one, a lost token or a token out of order all change what comes out.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.step import LogprobArrays, SchedulerOutput, StepOutput

VOCAB_SIZE = 12
_MASK = (1 << 61) - 1


def prefix_hashes(token_ids: list[int], salt: str | None) -> list[int]:
    """Entry i stands for ``token_ids[: i + 1]`` of a request with this salt."""
    state = 0x9E3779B97F4A7C15 & _MASK
    for byte in (salt or "").encode():
        state = _mix(state, byte + 1000)
    hashes = []
    for token_id in token_ids:
        state = _mix(state, token_id)
        hashes.append(state)
    return hashes


def _mix(state: int, value: int) -> int:
    state = (state ^ (value + 1)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 29)


def next_token(prefix_hash: int) -> int:
    return (prefix_hash >> 7) % VOCAB_SIZE


def score(prefix_hash: int, token_id: int) -> float:
    """The model's log-probability of a token behind a prefix; a float64 holds it."""
    return -float(_mix(prefix_hash, token_id + 5000) % 2**50)


def generate(
    prompt: list[int], salt: str | None, max_total_tokens: int, eos: frozenset[int], stops: frozenset[int]
) -> tuple[list[int], str, int | None]:
    """What a request must produce, one token at a time and without any engine: outputs, finish and stop reason."""
    token_ids = list(prompt)
    while True:
        token_id = next_token(prefix_hashes(token_ids, salt)[-1])
        token_ids.append(token_id)
        if token_id in eos:
            return token_ids[len(prompt) :], "stop", None
        if token_id in stops:
            return token_ids[len(prompt) :], "stop", token_id
        if len(token_ids) >= max_total_tokens:
            return token_ids[len(prompt) :], "length", None


@dataclasses.dataclass
class Row:
    request_id: str
    salt: str | None
    token_ids: list[int]
    #: tokens that it was admitted with
    num_admitted: int
    computed: int
    tables: list[list[int]]
    end_token_ids: frozenset[int]
    #: the device has come upon its end; until the host reads of it, steps may be scheduled that do nothing
    ended: bool = False


@dataclasses.dataclass
class Done:
    """A step that has run; only its output has not been read."""

    output: StepOutput
    #: request id -> positions that the step samples
    sampled: collections.Counter[str]
    #: brings what the step has copied out to the host, which may take as long as the step
    arrive: Callable[[], None] = lambda: None

    def result(self) -> StepOutput:
        self.arrive()
        return self.output


def _arrays(scores: list[float]) -> LogprobArrays | None:
    if not scores:
        return None
    nothing = np.zeros((len(scores), 0))
    return LogprobArrays(
        sampled=np.array(scores), rank=np.ones(len(scores), int), top_ids=nothing.astype(int), top=nothing
    )


class FakeDevice:
    """Implements `ModelRunner` over a dict of cache slots, in the order of launches, as a real device would."""

    def __init__(self, cache: CacheConfig, scheduler: SchedulerConfig) -> None:
        self.cache = cache
        self.scheduler = scheduler
        self.rows: dict[int, Row] = {}
        #: (block, offset) -> (group, position, prefix hash)
        self.slots: dict[tuple[int, int], tuple[int, int, int]] = {}
        #: host block -> offset -> the same
        self.host: dict[int, dict[int, tuple[int, int, int]]] = {}
        #: request id -> cache salt, for the model; the host does not send it
        self.salts: dict[str, str | None] = {}
        self.num_steps = 0
        self.num_launches = 0

    def execute(self, scheduled: SchedulerOutput) -> Done:
        self._check_limits(scheduled)
        arrive = functools.partial(self.host.update, self._copy(scheduled))
        self._admit(scheduled)
        sampled: collections.Counter[str] = collections.Counter()
        for row, start, count, wanted in zip(
            scheduled.rows, scheduled.starts, scheduled.counts, scheduled.wanted, strict=True
        ):
            first_sampled = max(start + count - wanted, self.rows[row].num_admitted - 1)
            sampled[self.rows[row].request_id] = max(start + count - first_sampled, 0)
        outputs: list[list[int]] = [[] for _ in scheduled.rows]
        scores: list[list[float]] = [[] for _ in scheduled.rows]
        if scheduled.num_drafts:
            self._draft(scheduled, outputs)
        else:
            if scheduled.num_steps > 1:
                self._check_several(scheduled)
            for index in range(scheduled.num_steps):
                self._step(scheduled, index, outputs, scores)
        self.num_launches += 1
        return Done(
            StepOutput(
                token_ids=[token_id for tokens in outputs for token_id in tokens],
                counts=[len(tokens) for tokens in outputs],
                scored_counts=[len(found) for found in scores] if any(scores) else [],
                prompt_logprobs=_arrays([value for found in scores for value in found]),
            ),
            sampled,
            arrive,
        )

    def _copy(self, scheduled: SchedulerOutput) -> dict[int, dict[int, tuple[int, int, int]]]:
        """Copy blocks in; returns what is copied out, by the host's block."""
        out, copies_in = scheduled.copies_out, scheduled.copies_in
        assert not {host for _, host in out} & {host for _, host in copies_in}
        for copies in (out, copies_in):
            assert len({block for block, _ in copies}) == len(copies) and all(block != 0 for block, _ in copies)
        assert len({host for _, host in out}) == len(out), "two blocks go to one place"
        offsets = range(self.cache.block_size)
        found = {host: {offset: self.slots[block, offset] for offset in offsets} for block, host in out}
        for block, host in copies_in:
            self.slots.update({(block, offset): value for offset, value in self.host[host].items()})
        return found

    def _step(
        self, scheduled: SchedulerOutput, index: int, outputs: list[list[int]], scores: list[list[float]]
    ) -> None:
        """One step of the launch, of the rows that go on: all that is scheduled of them, or one token of several."""
        entries = []
        for entry, row in enumerate(scheduled.rows):
            start, count, wanted = (values[entry] for values in (scheduled.starts, scheduled.counts, scheduled.wanted))
            if scheduled.num_steps > 1:
                if index >= count:
                    continue
                state = self.rows[row]
                state.ended = state.ended or state.token_ids[-1] in state.end_token_ids
                start, count, wanted = start + index, 1, 1
            if not self.rows[row].ended:
                entries.append((entry, row, start, count, wanted))
        hashes = {row: prefix_hashes(self.rows[row].token_ids, self.rows[row].salt) for _, row, *_ in entries}
        # A step writes everything before it reads anything: blocks may be shared within it.
        written: set[tuple[int, int]] = set()
        for _, row, start, count, _ in entries:
            self._write(self.rows[row], start, count, hashes[row], written)
        for entry, row, start, count, wanted in entries:
            state = self.rows[row]
            self._read(state, start, count, hashes[row])
            state.computed = start + count
            for position in range(state.computed - wanted, state.computed):
                if position + 1 < state.num_admitted:
                    scores[entry].append(score(hashes[row][position], state.token_ids[position + 1]))
                else:
                    outputs[entry].append(next_token(hashes[row][position]))
                    state.token_ids.append(outputs[entry][-1])
            assert len(state.token_ids) > state.computed, "a step samples where it catches up"
        assert sum(map(len, scores)) <= self.scheduler.max_scored_tokens
        self.num_steps += bool(entries)

    def _draft(self, scheduled: SchedulerOutput, outputs: list[list[int]]) -> None:
        """Every step has as many drafts as there is room for. How many of them are right, the hash says too; the wrong
        ones leave rubbish in the cache.
        """
        assert scheduled.counts == scheduled.wanted and not scheduled.admitted and not scheduled.masked_rows
        assert max(scheduled.counts) <= scheduled.num_steps * (1 + scheduled.num_drafts)
        for entry, row in enumerate(scheduled.rows):
            state, start, limit = self.rows[row], scheduled.starts[entry], scheduled.counts[entry]
            state.ended = state.ended or state.token_ids[-1] in state.end_token_ids
            assert state.ended or state.computed == len(state.token_ids) - 1
            assert state.ended or start >= state.computed
            if not scheduled.resumes[entry]:
                assert state.ended or start == state.computed, "the host knows where it is"
            for _ in range(scheduled.num_steps):
                place, left = state.computed, limit - len(outputs[entry])
                if state.ended or not left:
                    break
                hashes = prefix_hashes(state.token_ids, state.salt)
                drafts = min(scheduled.num_drafts, left - 1)
                right = (hashes[-1] >> 11) % (1 + drafts)
                for _ in range(1 + right):
                    token_id = next_token(prefix_hashes(state.token_ids, state.salt)[-1])
                    state.token_ids.append(token_id)
                    outputs[entry].append(token_id)
                    if token_id in state.end_token_ids:
                        break
                computed = len(state.token_ids) - 1
                hashes = prefix_hashes(state.token_ids, state.salt)[:computed]
                self._write(state, place, computed - place, hashes, set())
                for position in range(computed, place + 1 + drafts):
                    for group, table in enumerate(state.tables):
                        block_id = table[position // self.cache.block_size]
                        assert block_id != 0, "a draft's keys are written into the null block"
                        self.slots[block_id, position % self.cache.block_size] = (group, position, -1)
                self._read(state, place, computed - place, hashes)
                state.computed = computed
                state.ended = state.token_ids[-1] in state.end_token_ids
            self.num_steps += 1

    def _check_several(self, scheduled: SchedulerOutput) -> None:
        assert scheduled.counts == scheduled.wanted and scheduled.num_steps == max(scheduled.counts)
        assert not scheduled.admitted and not scheduled.masked_rows
        for row, start in zip(scheduled.rows, scheduled.starts, strict=True):
            state = self.rows[row]
            assert state.ended or start + 1 == len(state.token_ids) or state.token_ids[-1] in state.end_token_ids

    def forward(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        return scheduled

    def sample(self, launched: SchedulerOutput, masks: Mapping[int, np.ndarray]) -> Done:
        assert not masks, "the model has one next token, and no other"
        return self.execute(launched)

    def time_stages(self) -> None:
        """There are none."""

    def reset(self) -> None:
        self.slots.clear()

    def free_cache(self) -> None:
        self.slots.clear()

    def free_weights(self, *, keep_on_host: bool) -> None:
        """There are none."""

    def restore_weights(self) -> None:
        """There are none."""

    def shutdown(self) -> None:
        self.reset()
        self.rows.clear()

    def _check_limits(self, scheduled: SchedulerOutput) -> None:
        assert scheduled.step_sizes()[0] <= self.scheduler.max_num_batched_tokens
        assert len(scheduled.rows) <= self.scheduler.max_num_seqs
        assert len(set(scheduled.rows)) == len(scheduled.rows), "a row is scheduled twice"
        assert all(0 <= row < self.scheduler.max_num_seqs for row in scheduled.rows)
        assert all(count > 0 for count in scheduled.counts)
        entries = zip(scheduled.counts, scheduled.wanted, strict=True)
        assert all(0 <= wanted <= count for count, wanted in entries)

    def _admit(self, scheduled: SchedulerOutput) -> None:
        for new in scheduled.admitted:
            assert new.row in scheduled.rows
            assert new.num_computed_tokens < len(new.token_ids), "the last token has to be computed"
            assert len(new.block_ids) == len(self.cache.groups)
            tables = [list(ids) for ids in new.block_ids]
            self.rows[new.row] = Row(
                new.request_id,
                self.salts[new.request_id],
                list(new.token_ids),
                len(new.token_ids),
                new.num_computed_tokens,
                tables,
                new.end_token_ids,
            )
        admitted = {new.row for new in scheduled.admitted}
        for row, group, first, ids in scheduled.new_blocks:
            assert row not in admitted and row in scheduled.rows
            assert len(self.rows[row].tables[group]) == first, "new blocks go behind the table's last one"
            self.rows[row].tables[group].extend(ids)

    def _write(self, row: Row, start: int, count: int, hashes: list[int], written: set[tuple[int, int]]) -> None:
        assert start == row.computed, "a step goes on where the last one ended"
        assert start + count <= len(row.token_ids), "a token is computed that nobody has sampled"
        assert start + count < self.scheduler.max_model_len
        for group, table in enumerate(row.tables):
            for position in range(start, start + count):
                slot = (table[position // self.cache.block_size], position % self.cache.block_size)
                assert slot[0] != 0, "keys are written into the null block"
                assert slot not in written, "two requests write one slot"
                written.add(slot)
                self.slots[slot] = (group, position, hashes[position])

    def _read(self, row: Row, start: int, count: int, hashes: list[int]) -> None:
        for group, (spec, table) in enumerate(zip(self.cache.groups, row.tables, strict=True)):
            first = 0 if spec.sliding_window is None else max(0, start - spec.sliding_window + 1)
            for position in range(first, start + count):
                slot = (table[position // self.cache.block_size], position % self.cache.block_size)
                assert slot[0] != 0, f"position {position} is seen, but its block is given away"
                assert self.slots.get(slot) == (group, position, hashes[position]), (
                    f"{row.request_id} finds {self.slots.get(slot)} for position {position} of group {group}"
                )
