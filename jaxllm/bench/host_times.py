"""This says where the host's time goes, step by step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.bench.measurements import ranks
from jaxllm.engine.observe.step_observer import StepObserver

if TYPE_CHECKING:
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput

#: what a turn of the engine consists of, in the order of the report
PARTS = ("schedule", "pack", "launch", "read", "update", "output")


@dataclasses.dataclass(slots=True)
class Cycle:
    """The time from one read to the next, with one launch in between, in seconds."""

    num_tokens: int = 0
    num_seqs: int = 0
    schedule: float = 0.0
    #: rows and tokens into the device's buffer
    pack: float = 0.0
    #: upload and launch, and what a runner does about admissions and new blocks
    launch: float = 0.0
    #: from the device's answer being there to token ids as a list
    read: float = 0.0
    #: tokens appended, stops checked, blocks registered and freed
    update: float = 0.0
    #: text made, outputs built, metrics counted
    output: float = 0.0
    #: not the host's: it had nothing to do but wait for the device
    wait: float = 0.0
    #: not the engine's: prompts read and named for the prefix cache, which the tokenizer's threads do beside it
    prompts: float = 0.0
    #: from the ids of a step being known to the next launch being done
    critical: float = 0.0

    @property
    def total(self) -> float:
        return self.schedule + self.pack + self.launch + self.read + self.update + self.output


class HostTimes(StepObserver):
    """Times the parts of every cycle. It is told of the runner's `pack` and of the wait for a device (`timed`)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.cycles: list[Cycle] = []
        self._clock = clock
        self._cycle = Cycle()
        self._last = self._ended = clock()
        #: when the last step's ids were known, moved on by the time between turns; None: the next launch has come
        self._known: float | None = None

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose time counts as `part` of the cycle in which it is called, not as the part around."""

        def call(*args: Any) -> Any:
            before = self._clock()
            result = function(*args)
            spent = self._clock() - before
            setattr(self._cycle, part, getattr(self._cycle, part) + spent)
            self._last += spent
            return result

        return call

    def _lap(self, part: str) -> None:
        now = self._clock()
        setattr(self._cycle, part, getattr(self._cycle, part) + now - self._last)
        self._last = now

    def turn_begins(self) -> None:
        self._last = self._clock()
        if self._known is not None:
            self._known += self._last - self._ended

    def scheduled(self, step: SchedulerOutput) -> None:
        self._lap("schedule")
        self._cycle.num_tokens, self._cycle.num_seqs = step.step_sizes()[0], len(step.rows)
        self._last = self._clock()

    def launched(self, step: SchedulerOutput) -> None:
        self._lap("launch")
        if self._known is not None:
            self._cycle.critical = self._last - self._known
            self._known = None

    def read_begins(self, step: SchedulerOutput) -> None:
        if self._cycle.read and self._cycle.critical:
            self.cycles.append(self._cycle)
        self._cycle = Cycle()
        self._last = self._clock()

    def read(self, step: SchedulerOutput) -> None:
        self._lap("read")
        self._known = self._last

    def updated(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        self._lap("update")

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        self._lap("output")

    def turn_ends(self) -> None:
        self._ended = self._clock()


def summary(cycles: Sequence[Cycle]) -> dict[str, dict[str, float]]:
    """Return `measurements.ranks`, in milliseconds, of each part, "total", "critical path", "wait" and "prompts"."""
    names = {**{part: part for part in PARTS}, "total": "total", "critical path": "critical"}
    names |= {"wait": "wait", "prompts": "prompts"}
    return {name: ranks([1e3 * getattr(cycle, field) for cycle in cycles]) for name, field in names.items()}
