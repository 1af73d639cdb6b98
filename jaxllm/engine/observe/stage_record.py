"""What the stages of a pipeline did, and how much of the time they had nothing to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """A step at one stage. Times are in seconds from the trace's start.

    It begins when it is launched, when the stage before hands it on, or when this one is done with the step before it,
    whatever comes last.
    """

    step: int
    #: its number in the pipeline, from 0 on
    stage: int
    start: float
    end: float
    #: number of the replica
    engine: int = 0


def stage_records(
    times: Sequence[Sequence[tuple[int, float, float]]], zero: float, engine: int = 0
) -> list[StageRecord]:
    """The records of a pipeline, stage after stage.

    Args:
        times: of each stage, in order: step, when it was launched, when it was done.
        zero: the trace's start.
    """
    records: list[StageRecord] = []
    handed_on: dict[int, float] = {}
    for stage, steps in enumerate(times):
        free, ends = 0.0, {}
        for step, launched, end in steps:
            start = max(launched, free, handed_on.get(step, 0.0))
            end = max(end, start)  # whoever waits for an array may come late
            records.append(StageRecord(step=step, stage=stage, start=start - zero, end=end - zero, engine=engine))
            free = ends[step] = end
        handed_on = ends
    return records


def busy_shares(records: Sequence[StageRecord]) -> list[float]:
    """Of each stage of each replica, the share of the whole time in which it worked."""
    if not records:
        return []
    whole = max(record.end for record in records) - min(record.start for record in records)
    place = attrgetter("engine", "stage")
    stages = groupby(sorted(records, key=place), key=place)
    return [sum(record.end - record.start for record in own) / max(whole, 1e-9) for _, own in stages]


def bubble(records: Sequence[StageRecord]) -> float | None:
    """The share of the stages' time in which they had nothing to do; None: there are no stages."""
    shares = busy_shares(records)
    return 1 - sum(shares) / len(shares) if shares else None
