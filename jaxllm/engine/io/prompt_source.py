"""Where the prompts of a call come from: something that is all there, or something that has to be waited for."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_END = object()


class ReadySource(Generic[Item]):
    """Items that come without waiting, such as a list's."""

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self._following: list[Item] = []
        #: whether there are no more
        self.exhausted = False

    def take(self, most: int, *, wait: bool) -> list[Item]:
        """The next items, `most` at most; fewer only at the end."""
        taken = [*self._following, *itertools.islice(self._items, most - len(self._following))]
        # one ahead, to know the end when it is reached
        self._following = list(itertools.islice(self._items, 1))
        self.exhausted = not self._following
        return taken

    def finished(self) -> None:
        """One of the items taken is done with."""

    def close(self) -> None:
        self.exhausted = True


class WaitingSource(Generic[Item]):
    """Items that may take their time (a file, a socket, a queue that the outputs themselves feed), read by a thread of
    their own, so that the engine works meanwhile.

    Args:
        window: items that are read and not done with, at most.
    """

    def __init__(self, items: Iterator[Item], window: int):
        self.exhausted = False
        self._read: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(window)
        self._closed = False
        # a daemon: it may wait for an item that never comes
        threading.Thread(target=self._run, args=(items,), name="prompts", daemon=True).start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            while self._room.acquire() and not self._closed:
                item = next(items, _END)
                self._read.put(item)
                if item is _END:
                    break
        except BaseException as error:
            self._read.put(_Failure(error))

    def take(self, most: int, *, wait: bool) -> list[Item]:
        """The items that have come, `most` at most.

        Args:
            wait: for one, when none has come.

        Raises whatever reading them raised.
        """
        taken: list[Item] = []
        while len(taken) < most and not self.exhausted:
            try:
                item = self._read.get(block=wait and not taken)
            except queue.Empty:
                break
            if isinstance(item, _Failure):
                self.exhausted = True
                raise item.error
            if item is _END:
                self.exhausted = True
            else:
                taken.append(item)
        return taken

    def finished(self) -> None:
        """One of the items taken is done with: there is room for another."""
        self._room.release()

    def close(self) -> None:
        """Read no more; the thread ends when it gets its next item."""
        self._closed = self.exhausted = True
        self._room.release()


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error
