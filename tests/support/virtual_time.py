"""An engine over the null model whose device takes time, on a clock of its own: tests that measure without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxllm import LLM
from jaxllm.api.metric import since
from jaxllm.engine.observe.trace import Trace
from jaxllm.engine.observe.trace_recorder import TraceRecorder
from jaxllm.engine.step import SchedulerOutput, StepOutput


class VirtualTime:
    """The clock of one engine, whose host works only while it launches.

    Args:
        step_seconds: how long the device takes for a launch.
        host_seconds: how long the host does.
    """

    def __init__(
        self, llm: LLM, step_seconds: Callable[[SchedulerOutput], float], *, host_seconds: float = 0.0
    ) -> None:
        self.now = self._free = 0.0
        self._llm, (self._core,) = llm, llm.engine.core.cores
        runner: Any = self._core._runner
        execute = runner.execute
        self._core.counts._clock = self

        def timed(scheduled: SchedulerOutput) -> _Future:
            self.now += host_seconds
            self._free = max(self._free, self.now) + step_seconds(scheduled)
            return _Future(self, execute(scheduled), self._free)

        runner.execute = timed

    def __call__(self) -> float:
        return self.now

    def trace(self) -> Trace:
        """As `LLM.trace`, on this clock."""
        before: list[Any] = []

        def attach(trace: Trace) -> None:
            trace.settings = self._llm.engine.watching.settings
            before.append(self._core.metrics())
            before.append(TraceRecorder(trace, self._core.scheduler, self._llm.engine.runner.bucket, self))
            self._core.observe(before[1])

        def detach(trace: Trace) -> None:
            if before:
                trace.metrics = since(before[0], self._core.metrics())
                self._core.stop_observing(before[1])
                before[1].close()
                before.clear()

        return Trace(attach, detach)


class _Future:
    def __init__(self, time: VirtualTime, future: Any, done: float) -> None:
        self._time, self._future, self._done = time, future, done

    def result(self) -> StepOutput:
        self._time.now = max(self._time.now, self._done)
        return self._future.result()
