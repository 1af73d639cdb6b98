"""Log-probabilities as a request returns them: a dictionary a position, or one flat container of all positions."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, MutableSequence
from typing import Any, NoReturn


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at one position.

    `rank` counts from 1, the likeliest token of the vocabulary; None for tokens that were asked for by id.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


#: one position: token id -> log-probability. The sampled token is always there: `logprobs` = k gives k or k + 1 entries
PositionLogprobs = dict[int, Logprob]


class FlatLogprobs(MutableSequence):
    """The log-probabilities of many positions in a few flat arrays (`SamplingParams.flat_logprobs`).

    It reads like the list of dictionaries that it stands for: position, slice, length, iteration. A position without
    entries (the first of a prompt) reads as an empty dictionary. The arrays themselves are there for whoever wants
    speed: ``numpy.asarray(flat.logprobs)`` copies nothing. A generated position has as many entries as were asked for
    and one more, its own token in front, which may occur again among the others; so
    ``numpy.asarray(flat.logprobs).reshape(len(flat), -1)`` is a table.

    Positions can be appended, but neither replaced, deleted nor inserted.
    """

    def __init__(self) -> None:
        #: position i has the entries start_indices[i] to end_indices[i] - 1
        self.start_indices = array("q")
        self.end_indices = array("q")
        #: one an entry
        self.token_ids = array("i")
        self.logprobs = array("d")
        #: 0 where the rank is not known
        self.ranks = array("i")
        self.decoded_tokens: list[str | None] = []

    def append(self, value: PositionLogprobs | None) -> None:
        """Add one position."""
        entries = value or {}
        self.append_entries(
            list(entries),
            [entry.logprob for entry in entries.values()],
            [entry.rank for entry in entries.values()],
            [entry.decoded_token for entry in entries.values()],
        )

    def append_entries(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Add one position by its entries; all four have one value each."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.ranks.extend(rank or 0 for rank in ranks)
        self.decoded_tokens.extend(decoded_tokens)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, index: int | slice) -> Any:
        """A position's dictionary, or the container of a slice of positions."""
        if not isinstance(index, slice):
            position: PositionLogprobs = {}
            for i in range(self.start_indices[index], self.end_indices[index]):
                position.setdefault(
                    self.token_ids[i], Logprob(self.logprobs[i], self.ranks[i] or None, self.decoded_tokens[i])
                )
            return position
        part = FlatLogprobs()
        for start, end in zip(self.start_indices[index], self.end_indices[index], strict=True):
            part.append_entries(
                self.token_ids[start:end],
                self.logprobs[start:end],
                self.ranks[start:end],
                self.decoded_tokens[start:end],
            )
        return part

    def __iter__(self) -> Iterator[PositionLogprobs]:
        return (self[position] for position in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (FlatLogprobs, list)):
            return NotImplemented
        return len(self) == len(other) and all(mine == (theirs or {}) for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"FlatLogprobs({len(self)} positions, {len(self.token_ids)} entries)"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("FlatLogprobs can only be appended to; list(flat) is a list that can be changed")

    __setitem__ = __delitem__ = insert = _refuse


#: one entry a generated token
SampleLogprobs = list[PositionLogprobs] | FlatLogprobs
#: one entry a prompt token; the first is None (flat: has no entries)
PromptLogprobs = list[PositionLogprobs | None] | FlatLogprobs
