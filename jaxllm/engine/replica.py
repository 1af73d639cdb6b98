"""One copy of the model among several: its engine core, a thread for its turns, and what is asked of it."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.engine.core import EngineCore
    from jaxllm.engine.request import Request

#: requests that a replica has taken while its turn ran, with their prompts' texts
Arrived = list[tuple["Request", "str | None"]]


class Held(NamedTuple):
    """What an unfinished request adds to its replica's load."""

    tokens: int
    hashes: Sequence[bytes]


class Replica:
    """An engine core, and the turns that it takes in a thread of its own, if it is asked to.

    Between `begin` and `end` the core belongs to that thread, at all other times to whoever drives the engine.

    Args:
        number: of this replica.
    """

    def __init__(self, core: EngineCore, number: int):
        self.core, self.number = core, number
        #: the turn that runs, or has ended without anybody having taken what it brought
        self.turn: Future[list[RequestOutput]] | None = None
        #: tokens that its unfinished requests have to compute, at most
        self.load = 0
        #: of its unfinished requests
        self.held: dict[str, Held] = {}
        #: hashes of the blocks of their prompts: what is not cached yet will be
        self._expected: collections.Counter[bytes] = collections.Counter()
        self.arrived: Arrived = []
        self._work: queue.SimpleQueue[tuple[Future[list[RequestOutput]], Arrived] | None] = queue.SimpleQueue()
        #: for its turns, from the first one on
        self.thread: threading.Thread | None = None

    # What it is asked to do.

    def cost(self, request: Request) -> int:
        """What the request would cost here, in tokens: those before it, and twice its own that no cache has, since the
        time that they take is also lost for what comes after it.
        """
        return self.load + 2 * self._new_tokens(request)

    def _new_tokens(self, request: Request) -> int:
        """Tokens of a request, up to its end, that would have to be computed here."""
        manager = self.core.scheduler.kv_cache_manager
        hashes = manager.prompt_hashes(request)
        cached = 0
        while cached < len(hashes) and (hashes[cached] in self._expected or manager.is_cached(hashes[cached], 0)):
            cached += 1
        return _most_tokens(request, self.core.config.max_model_len) - cached * manager.block_size

    def add(self, request: Request, text: str | None) -> None:
        """Queue a request, also while a turn runs. Raises what `EngineCore.add_request` does."""
        self.core.check_request(request)
        tokens = self._new_tokens(request)
        hashes = tuple(self.core.scheduler.kv_cache_manager.prompt_hashes(request))
        self.arrived.append((request, text))
        self.held[request.request_id] = Held(tokens, hashes)
        self.load += tokens
        self._expected.update(hashes)

    def forget(self, request_id: str) -> None:
        """Count a request no more."""
        held = self.held.pop(request_id, None)
        if held is None:
            return
        self.load -= held.tokens
        self._expected.subtract(held.hashes)
        for block_hash in held.hashes:
            if not self._expected[block_hash]:
                del self._expected[block_hash]

    # Its turns.

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything; while none runs."""
        return bool(self.arrived) or not self.core.is_idle

    def begin(self) -> None:
        """Let it take a turn, with the requests that have arrived; does not wait for it."""
        arrived, self.arrived = self.arrived, []
        if self.thread is None:
            self.thread = threading.Thread(
                target=_take_turns, args=(self.core, self._work), name=f"jaxllm replica {self.number}", daemon=True
            )
            self.thread.start()
        self.turn = Future()
        self._work.put((self.turn, arrived))

    def end(self) -> list[RequestOutput]:
        """What its turn brings, for which this waits. Raises what `EngineCore.step` does."""
        turn = self.turn
        if turn is None:
            return []
        try:
            return turn.result()
        finally:
            # an interrupted wait leaves it running
            if turn.done():
                self.turn = None

    def settle(self) -> None:
        """Give the core what has arrived, while no turn runs."""
        arrived, self.arrived = self.arrived, []
        for request, text in arrived:
            self.core.add_request(request, text)

    def close(self) -> None:
        """End its thread, when its turn has ended."""
        self._work.put(None)


def _most_tokens(request: Request, max_model_len: int) -> int:
    """Tokens that a request has when it ends, at most."""
    if request.pools:
        return request.num_prompt_tokens
    room = max_model_len - request.num_prompt_tokens
    most = request.params.max_tokens
    return request.num_prompt_tokens + (room if most is None else min(most, room))


def _take_turns(core: EngineCore, work: queue.SimpleQueue[tuple[Future[list[RequestOutput]], Arrived] | None]) -> None:
    while (item := work.get()) is not None:
        turn, arrived = item
        try:
            for request, text in arrived:
                core.add_request(request, text)
            turn.set_result(core.step())
        except BaseException as error:
            turn.set_exception(error)
        # what it brought is its receiver's alone
        del item, turn, arrived
