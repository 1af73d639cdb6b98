"""A step that is being decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput


@dataclasses.dataclass(slots=True)
class PartialStep:
    """What has been decided of it."""

    output: SchedulerOutput
    #: tokens that are left to give away
    budget: int
    #: most tokens of one request
    limit: int
    #: running requests whose turn has not come
    left: Iterator[Request]
    #: prompt tokens of the step that can be scored, in all
    max_scored_tokens: int

    def limit_scored(self, request: Request, start: int, count: int) -> tuple[int, int]:
        """(tokens, how many of them are scored): as many of `count` as the step has room to score."""
        wanted = min(start + count, request.num_scored_tokens) - start
        if wanted <= 0:
            return count, 0
        room = self.max_scored_tokens - sum(self.output.scored)
        return (count, wanted) if wanted <= room else (room, room)

    def add(self, request: Request, start: int, count: int, sample: bool, num_scored: int) -> None:
        """Put a request in, which has no entry yet."""
        output = self.output
        output.rows.append(request.row)
        output.starts.append(start)
        output.counts.append(count)
        output.samples.append(sample)
        output.scored.append(num_scored)
        output.requests.append(request)
        if start + count + 1 >= request.max_total_tokens or request.repetition is not None:
            output.ending.append(request)
        self.budget -= count

    def take_back(self, request: Request) -> None:
        """Take a request out, if it is in."""
        self.budget += unschedule(self.output, request)


def unschedule(output: SchedulerOutput, victim: Request) -> int:
    """Take a request out of the step if it is in it already; returns the tokens that it gives back."""
    if victim not in output.requests:
        return 0
    index = output.requests.index(victim)
    count = output.counts[index]
    # less where it has ended before what is scheduled here
    victim.num_computed_tokens = min(victim.num_computed_tokens, output.starts[index])
    if output.samples[index]:
        victim.num_output_placeholders -= 1
    for entries in (output.rows, output.starts, output.counts, output.samples, output.scored, output.requests):
        del entries[index]
    output.new_blocks[:] = [entry for entry in output.new_blocks if entry[0] != victim.row]
    if victim in output.ending:
        output.ending.remove(victim)
    return count
