"""Programs that are made while the engine answers, one after the other, at low priority."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import JaxLLMError
from jaxllm.runner.compile.workers import Workers
from jaxllm.runner.memory import freed_memory

if TYPE_CHECKING:
    from jaxllm.runner.compile.programs import Programs

logger = logging.getLogger("jaxllm")

#: of the thread that compiles beside steps; XLA's pool, which generates code for it, keeps its own
NICENESS = 19


class Background:
    """Makes a start's late programs, and holds nothing of the device.

    What is traced takes the interpreter, in turns with the engine's steps. At low priority is what XLA does alone: a
    thread that had the interpreter and waited for a busy processor would hold up every step.

    Args:
        programs: have some that are late.
    """

    def __init__(self, programs: Programs):
        self._stopped = threading.Event()
        self._failed: dict[str, Exception] = {}
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(programs,), name="jaxllm compile late", daemon=True)
        # the interpreter ends a daemon thread wherever it is, in the middle of XLA's code the whole process with it
        atexit.register(self._end)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all programs are there.

        Raises:
            JaxLLMError: some are not, since they failed, or the engine was shut down.
        """
        self._thread.join()
        if self._failed:
            name, error = next(iter(self._failed.items()))
            raise JaxLLMError(
                f"{len(self._failed)} programs were not compiled, and steps run in larger ones. The first: {name}: "
                f"{error}"
            ) from error
        if not self._has_ended:
            raise JaxLLMError("the engine was shut down before all of its programs were there")

    def stop(self) -> None:
        """Begin no more programs, and wait for nothing: the one that is under way is kept for the next start."""
        self._stopped.set()

    def _end(self) -> None:
        self.stop()
        self._thread.join()

    def _run(self, programs: Programs) -> None:
        number = len(programs.late)
        # one thread for all: Python 3.12 begins none any more once the interpreter ends
        with Workers(1, "compile late") as worker:
            worker.submit(_lower_priority).result()
            for key in programs.late:
                if self._stopped.is_set():
                    break
                try:
                    programs.compile_late(key, functools.partial(_Beside, worker))
                except Exception as error:  # noqa: BLE001 - the engine has programs for every step
                    name = programs.name(key)
                    logger.debug("The program for %s was not compiled", name, exc_info=True)
                    if self._stopped.is_set():  # nobody waits for it
                        break
                    self._failed[name] = error
                    logger.warning("The program for %s was not compiled; steps run in larger ones: %s", name, error)
            else:
                self._has_ended = True
                freed_memory.give_back_code()
                if not self._failed:
                    logger.info("%d more programs are there, and all steps run in the smallest that holds them", number)
        atexit.unregister(self._end)


class _Beside:
    """A lowered program that is compiled by another thread."""

    def __init__(self, worker: Workers, program: Any):
        self._worker, self._program = worker, program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def compile(self, compiler_options: dict[str, str | bool]) -> Any:
        return self._worker.submit(self._program.compile, compiler_options).result()


def _lower_priority() -> None:
    """Of the calling thread, on Linux, where threads have their own; some containers do not allow it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
