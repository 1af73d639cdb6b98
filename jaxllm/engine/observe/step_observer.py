"""Who watches the engine's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.scheduling.request_update import StepUpdates
    from jaxllm.engine.step import SchedulerOutput


class StepObserver:
    """Is told how each step gets on, by the thread that drives the engine; does nothing by itself.

    A turn of the engine is what lies between `turn_begins` and `turn_ends`: `scheduled`, unless enough steps are
    launched; `launched`, unless there is nothing to launch; `processed` of a step that was read before;
    `scheduled_ahead`, if part of the next step was; `read_begins`, `read` and `updated` of the oldest step, if none was
    launched. `processed` of a step follows its `updated`, in the same turn or the next one. When the remaining steps
    are drained, or a request is aborted, these come without a turn around them. An observer does not raise.
    """

    def turn_begins(self) -> None:
        """The scheduler is about to be asked."""

    def scheduled(self, step: SchedulerOutput) -> None:
        """It has decided; an empty step is not launched."""

    def launched(self, step: SchedulerOutput) -> None:
        """The device has got the step."""

    def read_begins(self, step: SchedulerOutput) -> None:
        """The host waits for a launched step."""

    def read(self, step: SchedulerOutput) -> None:
        """Its sampled tokens are on the host."""

    def updated(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        """The requests that end with them have ended; the others get them before `processed`."""

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        """Text and outputs of an updated step are made, and stop strings have been looked for."""

    def scheduled_ahead(self) -> None:
        """Part of the next step has been decided."""

    def turn_ends(self) -> None:
        """The outputs go to the callers."""

    def failed(self) -> None:
        """A step has failed: everything in flight is lost and every request has ended."""

    def engine_ends(self) -> None:
        """The engine is shut down; no step follows."""
