"""Ctrl-C between steps, not inside one; while an engine starts; and while the modules that it needs are imported."""

from __future__ import annotations

import gc
import importlib
import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import NoReturn

#: seconds after which an interrupt that had no effect is raised again
AGAIN = 0.2


class DeferredInterrupt:
    """While active in the main thread, the first Ctrl-C waits for `check`; a second one interrupts at once.

    An interrupt in the middle of a step would leave half-made bookkeeping behind; between steps all requests can be
    aborted cleanly.
    """

    def __init__(self) -> None:
        self._pending = False
        self._previous = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> DeferredInterrupt:
        # something else than Python's own handler is somebody's decision
        self._active = self._active and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)
        # an interrupt says more than the error that it may have met
        if kind is None or issubclass(kind, Exception):
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            signal.default_int_handler(number, frame)
        self._pending = True

    def check(self) -> None:
        """Raise KeyboardInterrupt when Ctrl-C has come."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def whole_module(name: str) -> ModuleType:
    """Import a module. Ctrl-C waits until it is there, a second or two: inside of an import, extensions in C may crash
    on it, and what runs when garbage is collected (JAX has such a function) drops it.

    Raises KeyboardInterrupt when Ctrl-C has come.
    """
    with DeferredInterrupt():
        return importlib.import_module(name)


class StartInterrupt:
    """While active in the main thread, Ctrl-C interrupts a start wherever it is, and is not lost.

    Python drops what is raised inside a finalizer or a callback, of which a start sees many, and libraries may catch
    it. So Ctrl-C is remembered, for `check`, and raised again every `AGAIN` seconds, unless what it has raised is on
    its way out: cleaning up is not interrupted, but by a second Ctrl-C.

    Args:
        cancelled: whether the start is to end for another reason; looked at by `check` alone.
    """

    def __init__(self, cancelled: Callable[[], bool] = lambda: False):
        self._cancelled = cancelled
        self._pressed = False
        #: whether `check` is called all the time: then nothing is raised anywhere else
        self.is_polled = False
        self._is_active = self._is_over = self._is_again = False
        self._raised: KeyboardInterrupt | None = None
        # its `put` may be called by a handler of signals, whatever that has interrupted
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, name="jaxllm interrupt", daemon=True)

    def __enter__(self) -> StartInterrupt:
        is_main = threading.current_thread() is threading.main_thread()
        # something else than Python's own handler is somebody's decision
        self._is_active = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_active:
            self._watcher.start()
            try:
                signal.signal(signal.SIGINT, self._handle)
            except BaseException as error:  # Ctrl-C has come already
                self.__exit__(type(error))
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over = True
        if self._is_active:
            self._events.put("over")
            self._watcher.join()
            # a signal that the watcher has just sent is handled here, and not by the caller's handler
            signal.pthread_sigmask(signal.SIG_BLOCK, ())
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # an interrupt says more than the error that it may have met
        if kind is None:
            self.check()
        elif issubclass(kind, Exception) and self._pressed:
            self._interrupt()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_again, self._is_again = self._is_again, False
        self._pressed = True
        self._events.put("pressed")
        waits = self._is_over or self.is_polled or (is_again and self._is_on_its_way())
        if not (waits or _drops(frame)):
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._raised = KeyboardInterrupt()
        raise self._raised

    def _is_on_its_way(self) -> bool:
        """Whether what has been interrupted is cleaning up after what was raised."""
        error = sys.exc_info()[1]
        while error is not None and error is not self._raised:
            error = error.__context__
        return error is not None

    def _watch(self) -> None:
        """Send the signal again, as long as the start goes on."""
        event = self._events.get()
        while event != "over":
            try:
                event = self._events.get(timeout=AGAIN)
            except queue.Empty:
                self._is_again = True
                # to the thread itself: it may wait for a lock, which nothing else ends
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def check(self) -> None:
        """Raise KeyboardInterrupt when Ctrl-C has come, or the start is to end."""
        if self._pressed or self._cancelled():
            self._interrupt()


def _drops(frame: FrameType | None) -> bool:
    """Whether what is raised in a frame is dropped before it reaches anybody: Python prints a traceback of what
    finalizers raise, and what is called when garbage is collected (JAX has such a function, and so may anybody).
    """
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame.f_code.co_name != "__del__" and frame.f_code not in callbacks:
        frame = frame.f_back
    return frame is not None
