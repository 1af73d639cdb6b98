"""Ctrl-C between steps, not inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


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


class StartInterrupt:
    """While active in the main thread, Ctrl-C interrupts as ever, and is not lost: Python drops what is raised inside a
    finalizer, of which a start sees many. So it is remembered, too, and `check` raises it.

    Args:
        cancelled: whether the start is to end for another reason.
    """

    def __init__(self, cancelled: Callable[[], bool] = lambda: False):
        self._cancelled = cancelled
        self._pressed = False
        #: whether `check` is called all the time: then nothing is raised anywhere else
        self.is_polled = False
        self._active = False

    def __enter__(self) -> StartInterrupt:
        is_main = threading.current_thread() is threading.main_thread()
        # something else than Python's own handler is somebody's decision
        self._active = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._active:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if not self.is_polled:
            signal.default_int_handler(number, frame)

    def check(self) -> None:
        """Raise KeyboardInterrupt when Ctrl-C has come, or the start is to end."""
        if self._pressed or self._cancelled():
            raise KeyboardInterrupt
