"""JAX's profiler around the engine's steps: one trace at a time in a process, as JAX has it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.step_observer import StepObserver

if TYPE_CHECKING:
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput


class Profile(StepObserver):
    """A profile that is being written, with each turn of the engine and its phases named in it.

    The files are those of `jax.profiler.start_trace`, for XProf
    (``tensorboard --logdir``) and, the ``.trace.json.gz`` among them, for https://ui.perfetto.dev.

    Args:
        folder: written to when the profile stops.

    Raises:
        RuntimeError: another profile is being written in this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing = True
        self._turns = 0
        self._turn = contextlib.ExitStack()
        self._phase = contextlib.ExitStack()
        try:
            jax.profiler.start_trace(folder)
        except RuntimeError as error:
            raise ValidationError(
                f"a profile is being written already, and JAX writes one at a time ({error}): call stop_profile first."
            ) from error

    def stop(self) -> Path:
        """Write the files; returns their folder. Idempotent."""
        self.failed()
        if self._writing:
            self._writing = False
            jax.profiler.stop_trace()
        return self.folder

    def _enter(self, name: str) -> None:
        self._phase.close()
        self._phase.enter_context(jax.profiler.TraceAnnotation(name))

    def turn_begins(self) -> None:
        self._turn.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=self._turns))
        self._turns += 1
        self._enter("schedule")

    def scheduled(self, step: SchedulerOutput) -> None:
        self._phase.close()
        if step.rows:
            self._enter(f"launch {step.step_sizes()[0]} tokens x {len(step.rows)} seqs")

    def launched(self, step: SchedulerOutput) -> None:
        self._phase.close()

    def read_begins(self, step: SchedulerOutput) -> None:
        self._enter("wait for the device")

    def read(self, step: SchedulerOutput) -> None:
        self._enter("update")

    def updated(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        self._enter("outputs")

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        self._phase.close()

    def turn_ends(self) -> None:
        self._phase.close()
        self._turn.close()

    def failed(self) -> None:
        self._phase.close()
        self._turn.close()

    def engine_ends(self) -> None:
        self.stop()
