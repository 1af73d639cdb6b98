"""Who watches the engine's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput


class StepObserver:
    """Is told how each step gets on, by the thread that drives the engine; does nothing by itself.

    A turn of the engine is what lies between `turn_begins` and `turn_ends`: `scheduled`; `launched`, unless there is
    nothing to launch; and, when enough steps are launched or none could be, `read_begins`, `read`, `updated` and
    `processed` of the oldest one. A step whose tokens are restricted by masks is `launched` before all earlier ones are
    read. When the remaining steps are drained, they are read without a turn around it. An observer does not raise.
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

    def experts(self, step: SchedulerOutput, load: np.ndarray) -> None:
        """How many tokens of it each expert got, where that is counted (`StepOutput.expert_load`)."""

    def drafts(self, step: SchedulerOutput, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """How many drafts it checked, and how many of them were right (`StepOutput.drafted`)."""

    def updated(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        """The requests have them, and those that end with them have ended."""

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        """Text and outputs of an updated step are made, and stop strings have been looked for."""

    def turn_ends(self) -> None:
        """The outputs go to the callers."""

    def failed(self) -> None:
        """A step has failed: everything in flight is lost and every request has ended."""

    def engine_ends(self) -> None:
        """The engine is shut down; no step follows."""
