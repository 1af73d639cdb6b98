"""A device without a model: it remembers what every cache slot holds, and refuses a step that would read anything else.

Its model is a hash: a token's keys and values are the hash of its whole prefix, and the next token is that hash
modulo the vocabulary. So a wrong block, a stale one, a lost token or a token out of order all change what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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
    computed: int
    tables: list[list[int]]
    end_token_ids: frozenset[int]
    #: the device has come upon its end; until the host reads of it, steps may be scheduled that do nothing
    ended: bool = False


@dataclasses.dataclass
class Done:
    """A step that has run; only its output has not been read."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class FakeDevice:
    """Implements `ModelRunner` over a dict of cache slots, in the order of launches, as a real device would."""

    def __init__(self, cache: CacheConfig, scheduler: SchedulerConfig) -> None:
        self.cache = cache
        self.scheduler = scheduler
        self.rows: dict[int, Row] = {}
        #: (block, offset) -> (group, position, prefix hash)
        self.slots: dict[tuple[int, int], tuple[int, int, int]] = {}
        #: request id -> cache salt, for the model; the host does not send it
        self.salts: dict[str, str | None] = {}
        self.num_steps = 0
        self.num_launches = 0

    def execute(self, scheduled: SchedulerOutput) -> Done:
        self._check_limits(scheduled)
        self._admit(scheduled)
        if scheduled.steps:
            return self._execute_several(scheduled)
        entries = [
            entry
            for entry in zip(scheduled.rows, scheduled.starts, scheduled.counts, scheduled.samples, strict=True)
            if not self.rows[entry[0]].ended
        ]
        hashes = {row: prefix_hashes(self.rows[row].token_ids, self.rows[row].salt) for row in scheduled.rows}
        # A step writes everything before it reads anything: blocks may be shared within it.
        written: set[tuple[int, int]] = set()
        for row, start, count, _ in entries:
            self._write(self.rows[row], start, count, hashes[row], written)
        for row, start, count, _ in entries:
            self._read(self.rows[row], start, count, hashes[row])
        sampled = dict.fromkeys(scheduled.rows, -1)
        for row, start, count, sample in entries:
            state = self.rows[row]
            state.computed = start + count
            assert sample == (state.computed == len(state.token_ids)), "a step samples exactly where it catches up"
            token_id = next_token(hashes[row][-1]) if sample else -1
            if sample:
                state.token_ids.append(token_id)
            sampled[row] = token_id
        self.num_steps += 1
        self.num_launches += 1
        return Done(StepOutput(token_ids=list(sampled.values()), prompt_logprobs=self._scores(scheduled, hashes)))

    def _execute_several(self, scheduled: SchedulerOutput) -> Done:
        """Each step as if it were alone, of the rows that go on."""
        assert len(scheduled.steps) == len(scheduled.rows) and scheduled.num_steps > 1
        assert set(scheduled.counts) == {1} and all(scheduled.samples) and not any(scheduled.scored)
        assert not scheduled.admitted and not scheduled.masked_rows
        outputs = []
        for index in range(scheduled.num_steps):
            written: set[tuple[int, int]] = set()
            sampled = dict.fromkeys(scheduled.rows, -1)
            for row, start, steps in zip(scheduled.rows, scheduled.starts, scheduled.steps, strict=True):
                assert steps > 0
                state = self.rows[row]
                if index == 0 and start >= 1 and state.token_ids[-1] in state.end_token_ids:
                    state.ended = True
                if state.ended or index >= steps:
                    continue
                hashes = prefix_hashes(state.token_ids, state.salt)
                self._write(state, start + index, 1, hashes, written)
                self._read(state, start + index, 1, hashes)
                sampled[row] = next_token(hashes[-1])
                state.computed += 1
                state.token_ids.append(sampled[row])
                state.ended = sampled[row] in state.end_token_ids and index + 1 < steps
            outputs.append(list(sampled.values()))
            self.num_steps += any(token_id >= 0 for token_id in outputs[-1])
        self.num_launches += 1
        return Done(StepOutput(token_ids=outputs[0], later_token_ids=outputs[1:]))

    def _scores(self, scheduled: SchedulerOutput, hashes: dict[int, list[int]]) -> LogprobArrays | None:
        scored = [
            (hashes[row][position], self.rows[row].token_ids[position + 1])
            for row, start, count in zip(scheduled.rows, scheduled.starts, scheduled.scored, strict=True)
            for position in range(start, start + count)
        ]
        if not scored:
            return None
        nothing = np.zeros((len(scored), 0))
        return LogprobArrays(
            sampled=np.array([score(prefix, token_id) for prefix, token_id in scored]),
            rank=np.ones(len(scored), int),
            top_ids=nothing.astype(int),
            top=nothing,
        )

    def forward(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        return scheduled

    def sample(self, launched: SchedulerOutput, masks: Mapping[int, np.ndarray]) -> Done:
        assert not masks, "the model has one next token, and no other"
        return self.execute(launched)

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
        assert scheduled.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(scheduled.rows) <= self.scheduler.max_num_seqs
        assert len(set(scheduled.rows)) == len(scheduled.rows), "a row is scheduled twice"
        assert all(0 <= row < self.scheduler.max_num_seqs for row in scheduled.rows)
        assert all(count > 0 for count in scheduled.counts)
        assert sum(scheduled.scored) <= self.scheduler.max_scored_tokens
        for start, count, sample, scored in zip(
            scheduled.starts, scheduled.counts, scheduled.samples, scheduled.scored, strict=True
        ):
            assert 0 <= scored <= count - sample, f"{scored} of {count} tokens from {start} have a known successor"

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
