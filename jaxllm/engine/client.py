"""Who drives the engine, and who gets what comes out of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput, failed_output
from jaxllm.engine.io.parallel_sampling import ParallelSampling

if TYPE_CHECKING:
    from jaxllm.engine.core import EngineCore
    from jaxllm.engine.io.agreement import Agreement
    from jaxllm.engine.replicas import Replicas
    from jaxllm.engine.request import Request

Receiver = Callable[[RequestOutput], object]


class EngineClient:
    """The engine core behind a lock, with a receiver for every request.

    Any number of threads may add requests and call `step`: one of them runs a step at a time, and what it brings goes
    to whoever waits for it. So the calls of several threads share the engine's batches.
    """

    def __init__(self, core: EngineCore | Replicas, agreement: Agreement | None = None):
        self._core: EngineCore | Replicas | None = core
        #: with the other processes of the engine; None: there are none
        self.agreement = agreement
        #: held while the engine works
        self.lock = threading.RLock()
        self._receivers: dict[str, Receiver] = {}
        #: ids of the children of requests with n > 1
        self._children: dict[str, list[str]] = {}
        #: the users' names of their requests -> the engine's ids of them
        self._named: dict[str, str] = {}
        #: the users' names of what is more than one request -> what ends it
        self._ends: dict[str, Callable[[], object]] = {}
        # counting needs no lock: an event loop asks for ids while the engine works
        self._ids = itertools.count()

    @property
    def core(self) -> EngineCore | Replicas:
        """Raises RuntimeError after `close`."""
        if self._core is None:
            raise RuntimeError("the engine has been shut down; make a new LLM")
        return self._core

    def next_id(self, name: str | None = None) -> str:
        """The engine's id for a new request, which no other has, whatever users call theirs.

        Args:
            name: what the user calls it; None: it has no other name than the id.
        """
        number = next(self._ids)
        if name is not None:
            return f"{name}-{number}"
        # whoever ends a request by an id has to mean one
        while str(number) in self._named or str(number) in self._ends:
            number = next(self._ids)
        return str(number)

    def id_of(self, name: str) -> str:
        """The engine's id of a request, from what its outputs call it."""
        return self._named.get(name, name)

    def add(self, request: Request, text: str | None, receive: Receiver, name: str | None = None) -> None:
        """Queue a request; `receive` gets its outputs, in the thread whose step brings them.

        Args:
            name: what the user calls it, and its outputs therefore; None: as the engine does.

        Raises:
            ValidationError: it can never run, or a request of this name runs.
        """
        with self.lock:
            if name is None:
                self._add(request, text, receive)
                return
            self._check_free(name)

            def receive_named(output: RequestOutput) -> None:
                output.request_id = name
                if output.finished:
                    self._named.pop(name, None)
                receive(output)

            self._named[name] = request.request_id
            try:
                self._add(request, text, receive_named)
            except BaseException:
                self._named.pop(name, None)
                raise

    @contextlib.contextmanager
    def abortable(self, ends: Mapping[str, Callable[[], object]]) -> Iterator[None]:
        """While it lasts, `abort` takes these names, too: of work of many requests, which each has a function to end.

        Raises:
            ValidationError: a request of such a name runs.
        """
        with self.lock:
            for name in ends:
                self._check_free(name)
            self._ends.update(ends)
        try:
            yield
        finally:
            with self.lock:
                for name in ends:
                    del self._ends[name]

    def _check_free(self, name: str) -> None:
        if name in self._named or name in self._ends:
            # it may have ended, but nobody has been told so
            raise ValidationError(f"Request id {name!r} is in use; wait for its end or choose another.")

    def _add(self, request: Request, text: str | None, receive: Receiver) -> None:
        if request.pools or request.params.n == 1:
            self.core.add_request(request, text)
            self._receivers[request.request_id] = receive
            return
        parent_id = request.request_id

        def receive_whole(output: RequestOutput) -> None:
            if output.finished:
                self._children.pop(parent_id, None)
                if self._core is not None:
                    self._core.record_completed_prompt(request.params.n, family.longest)
            receive(output)

        family = ParallelSampling(request, receive_whole)
        ids = self._children[parent_id] = []
        try:
            for index, child in enumerate(family.children):
                self.core.add_request(child, text)
                self._receivers[child.request_id] = functools.partial(family.take, index)
                ids.append(child.request_id)
        except BaseException:
            self.end([parent_id])
            raise

    def step(self) -> None:
        """Run one step of the engine and deliver what it brings.

        An error of the device ends every request: this call raises it, and the receivers of all requests get an output
        that says so. While the engine sleeps or is paused, a RuntimeError is raised that ends none of
        them.
        """
        with self.lock:
            self.core.check_runs()
            self._deliver_all(self.core.step)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._receivers)

    @property
    def can_step(self) -> bool:
        """Whether there is something to run and the engine runs it; takes no lock, and may be asked after `close`."""
        core = self._core
        return core is not None and self.has_unfinished and not (core.is_sleeping or core.is_paused)

    def end(self, request_ids: Iterable[str]) -> None:
        """Leave nothing of these requests behind, finished or not; nothing of them is delivered any more."""
        with self.lock:
            ended = set(request_ids)
            if ended and self._named:
                self._named = {name: i for name, i in self._named.items() if i not in ended}
            ids = [i for request_id in ended for i in self._children.pop(request_id, (request_id,))]
            ids = [i for i in ids if self._receivers.pop(i, None)]
            if ids and self._core is not None:
                self._core.abort(ids)
                if not self._receivers:
                    self._deliver_all(self._core.drain)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; their receivers get what there is, with ``finish_reason="abort"``."""
        with self.lock:
            requests: list[str] = []
            for name in request_ids:
                if name in self._ends:
                    self._ends[name]()
                else:
                    requests.append(name)
            ids = [i for request_id in requests for i in self._children.get(request_id, (request_id,))]
            self._deliver(self.core.abort(ids))

    def abort_all(self) -> None:
        """End every request, as `abort` does."""
        with self.lock:
            self.abort(list(self._receivers))
            self._deliver_all(self.core.drain)

    def preempt_all(self) -> None:
        """Put every running request back into the queue; it will be computed anew."""
        with self.lock:
            self._deliver_all(self.core.drain)
            self.core.preempt_all()

    def pause(self, mode: str, *, preempt: bool = True) -> None:
        """Bring the requests to rest: "abort" ends them, "wait" runs them to their end, "keep" leaves them as they are.

        Args:
            preempt: what is left gives up its blocks, and will be computed anew.
        """
        with self.lock:
            # this pause takes the place of an earlier one, whose requests may have to run to their end
            self.core.resume()
            if mode == "abort":
                self.abort_all()
            while mode == "wait" and self._receivers:
                self.step()
            if preempt:
                self.preempt_all()
            else:
                self._deliver_all(self.core.drain)

    def close(self) -> None:
        """Let go of the engine, which the caller shuts down; whoever still waits is told."""
        with self.lock:
            self._core = None
            self._fail_all("the engine was shut down")

    def _deliver_all(self, work: Callable[[], Iterable[RequestOutput]]) -> None:
        """Deliver what `work` brings; when it fails, every request has ended."""
        try:
            outputs = work()
        except BaseException as error:
            self._fail_all(f"the engine failed: {error!r}")
            raise
        self._deliver(outputs)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            receive = self._receivers.get(output.request_id)
            if receive is None:
                continue
            if output.finished:
                del self._receivers[output.request_id]
            receive(output)

    def _fail_all(self, reason: str) -> None:
        waiting, self._receivers = self._receivers, {}
        self._children.clear()
        self._named.clear()
        for request_id, receive in waiting.items():
            # "abort", not "error": it is not the request's fault
            receive(failed_output(request_id, None, reason, finish_reason="abort"))
