"""The interpreter's end."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def finished_before_exit() -> Iterator[None]:
    """The interpreter's end waits for what is done inside, by whatever thread: it ends a daemon thread wherever it is,
    and in the middle of XLA's code the whole process with it.
    """
    lock = threading.Lock()
    at_exit = atexit.register(functools.partial(lock.acquire))
    try:
        with lock:
            yield
    finally:
        atexit.unregister(at_exit)
