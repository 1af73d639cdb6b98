"""A thread that drives an engine, for programs that must not wait for its steps."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from jaxllm.engine.client import EngineClient

logger = logging.getLogger("jaxllm")

Result = TypeVar("Result")


class EngineThread:
    """Runs steps while there is something to run, and between two of them what is posted.

    It ends with `close`; whoever starts one has to see to it that this happens before the interpreter ends.
    """

    def __init__(self, client: EngineClient):
        self._client = client
        self._work: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._drive, name="jaxllm engine", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._closing

    def post(self, work: Callable[[], Result]) -> Future[Result]:
        """What `work` returns or raises, done between two steps; a RuntimeError after `close`."""
        future: Future[Result] = Future()
        with self._wake:
            if self._closing:
                _do(future, _refuse)
            else:
                self._work.append((future, work))
                self._wake.notify()
        return future

    def post_logged(self, work: Callable[[], None]) -> None:
        """As `post`, with nobody there to hear of an error."""
        self.post(lambda: _logged(work))

    def check_open(self) -> None:
        """Raise RuntimeError after `close`."""
        if self._closing:
            _refuse()

    def close(self) -> None:
        """Let the thread finish its step, and do nothing more; whoever waits for what is posted is told. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _drive(self) -> None:
        client = self._client
        while True:
            with self._wake:
                while not (self._closing or self._work or client.can_step):
                    self._wake.wait()
                if self._closing:
                    break
            while self._work:
                _do(*self._work.popleft())
            if client.can_step:
                _logged(client.step)
        # nothing is added any more
        for future, _ in self._work:
            _do(future, _refuse)


def _refuse() -> None:
    raise RuntimeError("the engine has been shut down; make a new AsyncLLM")


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _logged(work: Callable[[], None]) -> None:
    """Do what runs steps of the engine, with nobody there to hear of an error."""
    try:
        work()
    except Exception:
        # whoever waits for a request has been told
        logger.exception("a step of the engine failed; its requests are ended")
