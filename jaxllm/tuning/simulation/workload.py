"""Requests that come at their times, with the lengths that they have and the beginnings that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from jaxllm.engine.observe.trace import Trace

#: tokens of a piece of a prompt whose tokens are known: every size of a block is a multiple of it
TOKEN_PIECE = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """One request."""

    #: seconds after the beginning
    arrival: float
    num_prompt_tokens: int
    num_output_tokens: int
    #: of the pieces of its prompt, in order (`Workload.piece_size`): equal ones have the same tokens. Behind the last
    #: of them nobody has any of its tokens
    piece_ids: tuple[Hashable, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Workload:
    """Requests in the order of their arrival."""

    requests: tuple[WorkloadRequest, ...]
    #: tokens of each piece that `piece_ids` name; the last of a prompt's may have fewer
    piece_size: int = TOKEN_PIECE
    #: where it is from, in words
    source: str = ""
    #: when the engine looks for requests first, in seconds
    begins: float = 0.0
    #: requests at a time: others are sent when one of these has ended, and count from then; None: any number
    max_concurrency: int | None = None
    _hashes: dict[int, list[tuple[bytes, ...]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValidationError(f"there are no requests in {self.source or 'the workload'}.")
        ordered = tuple(sorted(self.requests, key=lambda request: request.arrival))
        object.__setattr__(self, "requests", ordered)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of prompt and output of the longest request: no `max_model_len` below it serves the workload."""
        return max(request.num_prompt_tokens + request.num_output_tokens for request in self.requests)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival - self.requests[0].arrival

    @property
    def shared(self) -> float:
        """The share of the prompts' tokens that an earlier prompt begins with as well, in [0, 1]: no prefix cache hits
        more.
        """
        seen: set[bytes] = set()
        tokens = 0
        for hashes in self.block_hashes(self.piece_size):
            tokens += self.piece_size * next((i for i, each in enumerate(hashes) if each not in seen), len(hashes))
            seen.update(hashes)
        return tokens / self.num_prompt_tokens

    def __str__(self) -> str:
        rate = "at once" if not self.seconds else f"in {self.seconds:.4g} s"
        return (
            f"{len(self):,} requests {rate}, {self.num_prompt_tokens:,} prompt tokens ({self.shared:.0%} of them "
            f"shared), {self.num_output_tokens:,} output tokens"
        )

    def __repr__(self) -> str:
        return f"Workload({self})"

    def at_rate(self, factor: float) -> Workload:
        """The same requests, coming `factor` times as fast."""
        if not factor > 0:
            raise ValidationError(f"a rate must be above 0, got {factor:g}.")
        faster = (dataclasses.replace(each, arrival=each.arrival / factor) for each in self.requests)
        return dataclasses.replace(self, requests=tuple(faster), begins=self.begins / factor)

    def block_hashes(self, block_size: int) -> list[tuple[bytes, ...]]:
        """Of each request, the hashes of the full blocks of its prompt. Two blocks have one where all tokens up to
        their ends are known to be the same: of blocks that end inside of a piece, where the whole piece is.
        """
        found = self._hashes.get(block_size)
        if found is None:
            numbers: dict[Hashable, int] = {}
            rows = ((number, each) for number, each in enumerate(self.requests))
            found = self._hashes[block_size] = [self._hashes_of(*row, block_size, numbers) for row in rows]
        return found

    def _hashes_of(
        self, number: int, request: WorkloadRequest, block_size: int, numbers: dict[Hashable, int]
    ) -> tuple[bytes, ...]:
        # a chain of pieces stands for all tokens up to its end
        chain, chains = -1, []
        for piece in request.piece_ids:
            chain = numbers.setdefault((chain, piece), len(numbers))
            chains.append(chain)
        hashes = []
        for block in range(request.num_prompt_tokens // block_size):
            last = ((block + 1) * block_size - 1) // self.piece_size
            chain = chains[last] if last < len(chains) else -1 - number
            hashes.append(chain.to_bytes(8, "little", signed=True) + block.to_bytes(8, "little"))
        return tuple(hashes)

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        output_lengths: Iterable[int],
        arrivals: Iterable[float] | None = None,
        *,
        source: str = "",
    ) -> Workload:
        """Of prompts as token ids.

        Args:
            arrivals: of each, in seconds; None: all come at once.
        """
        times = [0.0] * len(prompts) if arrivals is None else list(arrivals)
        requests = (
            WorkloadRequest(
                arrival=arrival,
                num_prompt_tokens=len(prompt),
                num_output_tokens=length,
                piece_ids=_pieces(prompt),
            )
            for prompt, length, arrival in zip(prompts, output_lengths, times, strict=True)
        )
        return cls(requests=tuple(requests), source=source)

    @classmethod
    def of_trace(cls, trace: Trace, *, source: str = "the trace") -> Workload:
        """The requests of a trace that got at least one token. What they share is known by blocks of the engine's size,
        where it had a prefix cache.

        Raises:
            ValidationError: there are none.
        """
        done = [request for request in trace.requests if request.num_output_tokens]
        if not done:
            raise ValidationError(f"{source} has no requests that got a token.")
        first = min(request.queued for request in done)
        requests = (
            WorkloadRequest(
                arrival=request.queued - first,
                num_prompt_tokens=request.num_prompt_tokens,
                num_output_tokens=request.num_output_tokens,
                piece_ids=request.block_hashes,
            )
            for request in done
        )
        size = trace.settings.block_size if trace.settings is not None else None
        begins = max(0.0, trace.steps[0].start - first) if trace.steps else 0.0
        return cls(requests=tuple(requests), piece_size=size or TOKEN_PIECE, source=source, begins=begins)


def _pieces(prompt: Sequence[int]) -> tuple[Hashable, ...]:
    return tuple(tuple(prompt[start : start + TOKEN_PIECE]) for start in range(0, len(prompt), TOKEN_PIECE))


def piece_size_of(lengths: Sequence[int], counts: Sequence[int]) -> int | None:
    """How many tokens a piece has, where prompts of these lengths have so many; None: no usual number goes with them.
    Mooncake's traces have 512, those of Alibaba's Bailian 16.
    """
    for size in (512, 16, 32, 64, 128, 256, 1024):
        if all(math.ceil(n / size) == count or n // size == count for n, count in zip(lengths, counts, strict=True)):
            return size
    return None
