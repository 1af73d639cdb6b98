"""Threads for what cannot be interrupted, XLA's compiler before all, and which Ctrl-C does not wait for."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")

#: seconds that whoever interrupts waits for threads that are about to end
PATIENCE = 0.5
#: of the names of threads
_PREFIX = "jaxllm start: "


class Workers(concurrent.futures.Executor):
    """An executor whose threads an interrupted program leaves behind, where `ThreadPoolExecutor` waits for them: at the
    end of its context, and again at the end of the interpreter.

    As a context manager it waits for all work. When an error ends it, what has not begun is cancelled, and what runs is
    waited for; Ctrl-C waits for nothing that takes longer than `PATIENCE`.

    Args:
        count: of threads, started as they are needed.
        name: what they are called.
    """

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name
        self._queue: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Result]:
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._queue.put((future, lambda: fn(*args, **kwargs)))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=_work, args=(self._queue,), name=_PREFIX + self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while item := self._queue.get_nowait():
                    item[0].cancel()
        for _ in self._threads:
            self._queue.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.shutdown(wait=not interrupted, cancel_futures=kind is not None)
        if interrupted:
            end = time.monotonic() + PATIENCE
            for thread in self._threads:
                thread.join(max(end - time.monotonic(), 0))
            if left := [thread for thread in self._threads if thread.is_alive()]:
                _Leave(left)


class _Leave:
    """Ends the interpreter while threads are left.

    It ends a thread that comes back to it wherever that is, and in the middle of XLA's code the whole process with it,
    by SIGABRT. So they are waited for, unless an unhandled Ctrl-C is what ends the program: then the process ends as
    Python ends it, by SIGINT, before there is anything to come back to.
    """

    def __init__(self, threads: list[threading.Thread]):
        self._threads = threads
        atexit.register(self._end)

    def _end(self) -> None:
        atexit.unregister(self._end)
        unhandled = getattr(sys, "last_type", None)
        interrupted = isinstance(unhandled, type) and issubclass(unhandled, KeyboardInterrupt)
        if interrupted and any(thread.is_alive() for thread in self._threads):
            # what else is to be done at the end
            atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
            end_by_interrupt()
        for thread in self._threads:
            thread.join()


def end_by_interrupt() -> None:
    """End the process as an unhandled Ctrl-C does, at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def leave(status: int) -> None:
    """End the process with `status`, at once. For the owner of the process, after Ctrl-C: the interpreter's own end
    waits for threads that nobody waits for, and what JAX had begun may crash in it.
    """
    if not any(thread.name.startswith(_PREFIX) for thread in threading.enumerate()):
        atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _work(work: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := work.get()) is not None:
        future, do = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(do())
            except BaseException as error:
                future.set_exception(error)
        # what it made is its receiver's alone
        del item, future, do
