"""The requests that wait for a row and blocks, in the order in which they get them.

A request that finishes while it waits is passed over when its turn comes, not searched for: aborting a whole queue
stays linear.
"""

from __future__ import annotations

import collections
import heapq
from typing import Protocol

from jaxllm.engine.request import Request


class WaitingQueue(Protocol):
    """What the scheduler wants of a queue."""

    def __len__(self) -> int:
        """Requests that wait, finished ones not counted."""
        ...

    def push(self, request: Request) -> None:
        """Add a request that has just arrived."""
        ...

    def push_front(self, request: Request) -> None:
        """Add a request that was preempted."""
        ...

    def peek(self) -> Request:
        """The request whose turn it is. Raises IndexError when none waits."""
        ...

    def pop(self) -> Request:
        """Remove and return the request whose turn it is. Raises IndexError when none waits."""
        ...

    def discard_finished(self, request: Request) -> None:
        """Tell the queue that a request in it has finished: its `status` says so already."""
        ...


class FCFSQueue:
    """First come, first served; a preempted request goes to the head."""

    def __init__(self) -> None:
        self._queue: collections.deque[Request] = collections.deque()
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, request: Request) -> None:
        self._queue.append(request)
        self._live += 1

    def push_front(self, request: Request) -> None:
        self._queue.appendleft(request)
        self._live += 1

    def peek(self) -> Request:
        queue = self._queue
        while queue[0].is_finished:
            queue.popleft()
        return queue[0]

    def pop(self) -> Request:
        self.peek()
        self._live -= 1
        return self._queue.popleft()

    def discard_finished(self, request: Request) -> None:
        self._live -= 1
        if not self._live:
            self._queue.clear()


def priority_key(request: Request) -> tuple[int, float, int]:
    """Order of the "priority" policy: the smaller priority first, then the earlier arrival."""
    return (request.priority, request.arrival_time, request.arrival_order)


class PriorityQueue:
    """Smaller `priority` first, then earlier arrival; preempted requests have no other place."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Request]] = []
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (priority_key(request), request))
        self._live += 1

    def push_front(self, request: Request) -> None:
        self.push(request)

    def peek(self) -> Request:
        heap = self._heap
        while heap[0][1].is_finished:
            heapq.heappop(heap)
        return heap[0][1]

    def pop(self) -> Request:
        self.peek()
        self._live -= 1
        return heapq.heappop(self._heap)[1]

    def discard_finished(self, request: Request) -> None:
        self._live -= 1
        if not self._live:
            self._heap.clear()
