"""A folder that appears when all of it is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from jaxllm.weights.errors import WeightsError

#: signals that end a process which does not handle them
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A folder to be filled that becomes `directory` when the body ends without an error, and vanishes otherwise: by
    Ctrl-C, and by signals that end the process, too.

    Raises:
        WeightsError: something is there already.
    """
    directory = directory.absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise WeightsError(
            f"{directory} exists already, and is not an empty directory; save into another one, or remove it first"
        )
    unfinished = directory.with_name(f"{directory.name}.unfinished-{os.getpid()}")
    with _Removal(unfinished) as removal:
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise WeightsError(f"{directory}: cannot be made: {error.strerror or error}") from error
        try:
            yield unfinished
            if directory.exists():
                directory.rmdir()
            unfinished.rename(directory)
        except BaseException:
            removal()
            raise


class _Removal:
    """Removes a folder, and while it is active in the main thread does so before a signal ends the process."""

    def __init__(self, folder: Path):
        self._folder, self._signals = folder, []

    def __enter__(self) -> _Removal:
        if threading.current_thread() is threading.main_thread():
            # what has a handler is somebody's decision
            self._signals = [each for each in _ENDING if signal.getsignal(each) is signal.SIG_DFL]
            for each in self._signals:
                signal.signal(each, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._signals:
            signal.signal(each, signal.SIG_DFL)

    def __call__(self) -> None:
        """Remove it, all of it: a second Ctrl-C has no effect."""
        if threading.current_thread() is not threading.main_thread():
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
