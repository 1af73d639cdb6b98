"""Which adapters the device has: at most so many at once, the one that nobody has used for the longest gives way.

A request whose adapter is not there reserves a slot: an empty one, or the one that the fewest requests use. No further
request is admitted with the adapter that has it until then, so that those that use it come to their end and nobody
waits for ever, while all others go on.
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

from jaxllm.engine.adapters import PATIENCE

if TYPE_CHECKING:
    from jaxllm.engine.adapters import Adapter, AdapterStore
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput


class AdapterSlots:
    """The slots of one scheduler's runner.

    Args:
        num_slots: adapters that the device has at once.
        store: has their matrices.
    """

    def __init__(self, num_slots: int, store: AdapterStore):
        self._store = store
        self._held: list[Adapter | None] = [None] * num_slots
        #: running requests of each slot
        self._users = [0] * num_slots
        #: when each was last taken
        self._taken = [0] * num_slots
        self._num_taken = 0
        #: of each slot, the request that waits for it
        self._reserved: list[Request | None] = [None] * num_slots
        #: what `find` found: the request, its slot, and the matrices that go there, None where they are there
        self._found: tuple[Request, int, Any] | None = None
        #: adapters that are not there in this step, whose other requests need no look
        self._absent: set[Adapter] = set()
        #: requests whose adapter cannot be read; their `error` says why
        self._failed: list[Request] = []

    def begin(self) -> None:
        """A step begins."""
        self._absent.clear()

    def find(self, request: Request) -> bool:
        """Whether a waiting request can be admitted: its adapter is there, or can be put into a slot now."""
        adapter = request.adapter
        if adapter is None:
            return True
        if adapter in self._absent:
            return False
        slot = self._slot(request, adapter)
        if slot is None:
            # all requests of one that cannot be read fail at once
            if adapter.error is None:
                self._absent.add(adapter)
            return False
        # other threads may take them out of the host's memory at any time
        matrices = None if self._held[slot] is adapter else adapter.matrices
        if matrices is None and self._held[slot] is not adapter:
            return False
        self._found = request, slot, matrices
        return True

    def _slot(self, request: Request, adapter: Adapter) -> int | None:
        for slot, waiting in enumerate(self._reserved):
            if waiting is not None and (waiting.is_finished or waiting.row >= 0):
                self._reserved[slot] = None
        if adapter in self._held:
            slot = self._held.index(adapter)
            waiting = self._reserved[slot]
            return slot if waiting is None or waiting.adapter is adapter else None
        slots = range(len(self._held))
        slot = next((i for i in slots if (w := self._reserved[i]) is not None and w.adapter is adapter), None)
        if slot is None or self._users[slot]:
            free = [i for i in slots if self._reserved[i] is None and not self._is_pinned(i)]
            best = min(free, key=lambda i: (self._users[i], self._held[i] is not None, self._taken[i]), default=None)
            if slot is None:
                if best is None:
                    return None
                slot, self._reserved[best] = best, request
            elif best is not None and not self._users[best]:
                # another one has become free before the one that it waits for
                self._reserved[best], self._reserved[slot] = self._reserved[slot], None
                slot = best
        if self._users[slot] or not self._store.is_ready(adapter):
            return None
        if adapter.error is not None:
            self._reserved[slot] = None
            request.error = adapter.error
            self._failed.append(request)
            return None
        return slot

    def _is_pinned(self, slot: int) -> bool:
        held = self._held[slot]
        return held is not None and held.is_pinned

    def take(self, request: Request, step: SchedulerOutput) -> None:
        """Give a request, which is admitted in this step, the slot that `find` has just found for it."""
        if request.adapter is None:
            return
        assert self._found is not None
        found, slot, matrices = self._found
        assert found is request
        self._found = self._reserved[slot] = None
        if matrices is not None:
            self._held[slot] = request.adapter
            step.adapter_loads.append((slot, matrices))
        self._num_taken += 1
        self._users[slot] += 1
        self._taken[slot] = self._num_taken
        request.adapter_slot = slot

    def release(self, request: Request) -> None:
        """Take the slot from a request that ends, or is preempted."""
        if request.adapter_slot >= 0:
            self._users[request.adapter_slot] -= 1
            request.adapter_slot = -1

    def take_failed(self) -> list[Request]:
        """Requests whose adapter turned out not to be readable since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def wait(self) -> None:
        """Wait a little for an adapter, if any is being read: nothing else is left to do."""
        adapters = [waiting.adapter for waiting in self._reserved if waiting is not None]
        # another thread may end one between two looks
        loading = [future for a in adapters if a is not None and (future := a.loading) is not None]
        if loading:
            concurrent.futures.wait(loading, PATIENCE, concurrent.futures.FIRST_COMPLETED)

    def forget(self) -> None:
        """The device has lost them; no request runs."""
        self._held = [None] * len(self._held)
