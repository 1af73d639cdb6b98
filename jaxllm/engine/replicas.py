"""Several copies of the model as one engine: which of them gets a request, and turns that none waits for another in."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import failed_output
from jaxllm.engine.observe.metrics import total_stats
from jaxllm.engine.replica import Replica

if TYPE_CHECKING:
    from jaxllm.api.metric import Metric
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.core import EngineCore
    from jaxllm.engine.observe.metrics import EngineStats
    from jaxllm.engine.observe.step_observer import StepObserver
    from jaxllm.engine.request import Request

logger = logging.getLogger("jaxllm")


class Replicas:
    """What `EngineCore` is, over several of them. Not thread-safe: one thread drives it.

    A request goes to the replica where it costs least (`Replica.cost`): of idle ones the one that has most of its
    beginning gets it, and of equal ones the least loaded. A prefix that all have in common does not crowd them onto one
    replica, and completions of one prompt stay together where the prompt is worth it.

    Every replica takes its turns (`EngineCore.step`) in a thread of its own, and `step` returns when one of them has
    ended. Between two calls of `step` a replica ends its turn and begins none.

    A turn that fails ends the requests of its replica, each with an output that says why; the others go on, and so does
    the replica, with an empty cache.
    """

    def __init__(self, cores: Sequence[EngineCore]):
        self.cores = tuple(cores)
        self._replicas = [Replica(core, number) for number, core in enumerate(cores)]
        #: of unfinished requests
        self._of: dict[str, Replica] = {}
        #: outputs of turns that others than `step` have waited for
        self._kept: list[RequestOutput] = []
        #: who is told of turns of the whole; replaced as a whole, since any thread may do so
        self._observers: tuple[StepObserver, ...] = ()
        self._observers_lock = threading.Lock()
        self._closed = False

    @property
    def config(self) -> SchedulerConfig:
        """The limits of each replica."""
        return self.cores[0].config

    @property
    def max_num_seqs(self) -> int:
        """Of all replicas."""
        return sum(core.max_num_seqs for core in self.cores)

    # Requests.

    def add_request(self, request: Request, text: str | None) -> None:
        """Queue a request with a replica. Raises what `EngineCore.add_request` does."""
        if request.request_id in self._of:
            raise ValidationError(f"Request id {request.request_id!r} is in use; wait for its end or choose another.")
        self.cores[0].check_request(request)
        replica = min(self._replicas, key=lambda replica: replica.cost(request))
        replica.add(request, text)
        self._of[request.request_id] = replica

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests and return what there is of them, behind what their replicas' turns bring, for which this waits.
        Unknown ids are passed over.
        """
        found: dict[int, list[str]] = {}
        for request_id in request_ids:
            if request_id in self._of:
                found.setdefault(self._of[request_id].number, []).append(request_id)
        for number in found:
            self._rest(self._replicas[number])
        outputs, self._kept = self._kept, []
        for number, ids in found.items():
            outputs += self._noted(self.cores[number].abort(ids))
        return outputs

    def _noted(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Forget the requests that end with these outputs, which are returned."""
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def _forget(self, request_id: str) -> None:
        replica = self._of.pop(request_id, None)
        if replica is not None:
            replica.forget(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._of)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not any(replica.turn is not None or replica.has_work for replica in self._replicas)

    # Turns.

    def step(self) -> list[RequestOutput]:
        """Let every replica that rests take a turn, and wait until one of those that run has ended; returns what it
        brought, which may be nothing.
        """
        self.check_runs()
        for observer in self._observers:
            observer.turn_begins()
        for replica in self._replicas:
            if replica.turn is None and replica.has_work:
                replica.begin()
        outputs, self._kept = self._kept, []
        try:
            turns = [replica.turn for replica in self._replicas if replica.turn is not None]
            if turns and not outputs:
                concurrent.futures.wait(turns, return_when=concurrent.futures.FIRST_COMPLETED)
            for replica in self._replicas:
                if replica.turn is not None and replica.turn.done():
                    outputs += self._end(replica)
        except BaseException:  # Ctrl-C, while it waited
            self.recover()
            raise
        for observer in self._observers:
            observer.turn_ends()
        return outputs

    def _end(self, replica: Replica) -> list[RequestOutput]:
        """What a replica's turn brings; where it failed, the ends of its requests."""
        try:
            return self._noted(replica.end())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other replicas go on
            return self._failed(replica, error)

    def _failed(self, replica: Replica, error: Exception) -> list[RequestOutput]:
        """The ends of the requests that a replica has lost; those that it has not begun with are kept."""
        logger.error("Replica %d failed; its requests are ended", replica.number, exc_info=error)
        kept = {request.request_id for request, _ in replica.arrived}
        # "abort", not "error": it is not the request's fault
        return self._noted(
            [
                failed_output(request_id, None, f"replica {replica.number} failed: {error!r}", finish_reason="abort")
                for request_id in list(replica.held)
                if request_id not in kept
            ]
        )

    def _rest(self, replica: Replica) -> None:
        """Wait for a replica's turn, and give its core what has arrived: whoever drives the engine may ask it now."""
        if replica.turn is not None:
            self._kept += self._end(replica)
        replica.settle()

    def rest(self) -> None:
        """Wait until no turn runs; what they bring is returned by the next `step`, `abort` or `drain`."""
        for replica in self._replicas:
            self._rest(replica)

    def drain(self) -> list[RequestOutput]:
        """Read what is in flight and return its outputs, of requests that still live."""
        self.rest()
        outputs, self._kept = self._kept, []
        for replica in self._replicas:
            try:
                outputs += self._noted(replica.core.drain())
            except Exception as error:  # noqa: BLE001 - as in a turn
                outputs += self._failed(replica, error)
        return outputs

    def recover(self) -> None:
        """End every request; the caches' contents are lost."""
        for replica in self._replicas:
            if replica.turn is not None:
                self._end(replica)
            replica.arrived.clear()
            replica.core.recover()
            for request_id in list(replica.held):
                self._forget(request_id)
        self._kept = []
        for observer in self._observers:
            observer.failed()

    def preempt_all(self) -> None:
        """Put every running request back into its replica's queue, after all steps have been read."""
        self.rest()
        for core in self.cores:
            core.preempt_all()

    def forget_adapters(self) -> None:
        """As `EngineCore.forget_adapters`."""
        for core in self.cores:
            core.forget_adapters()

    # Pauses and sleep, of all of them.

    @property
    def is_paused(self) -> bool:
        return self.cores[0].is_paused

    def pause(self, *, refuse: bool) -> None:
        """As `EngineCore.pause`."""
        self.rest()
        for core in self.cores:
            core.pause(refuse=refuse)

    def resume(self) -> None:
        """As `EngineCore.resume`."""
        for core in self.cores:
            core.resume()

    def check_runs(self) -> None:
        """Raise RuntimeError while the engine sleeps or is paused."""
        self.cores[0].check_runs()

    @property
    def is_sleeping(self) -> bool:
        return self.cores[0].is_sleeping

    def check_awake(self) -> None:
        """Raise RuntimeError while anything sleeps."""
        self.cores[0].check_awake()

    def sleep(self, level: int, *, kv_cache: bool = False) -> None:
        """As `EngineCore.sleep`."""
        self.rest()
        for core in self.cores:
            core.sleep(level, kv_cache=kv_cache)

    def wake_up(self, tags: set[str]) -> bool:
        """As `EngineCore.wake_up`; the first replica reads weights, and the others take them from it."""
        return all([core.wake_up(tags) for core in self.cores])

    def reset_prefix_cache(self, *, host_pool: bool = False) -> bool:
        """As `EngineCore.reset_prefix_cache`; False where any replica did nothing."""
        self.rest()
        return all([core.reset_prefix_cache(host_pool=host_pool) for core in self.cores])

    # What others count and watch.

    def record_rejection(self, reason: str) -> None:
        """Count a prompt that was refused; any thread may do so."""
        self.cores[0].record_rejection(reason)

    def record_completed_prompt(self, n: int, longest_output: int) -> None:
        """Count a prompt all of whose `n` > 1 completions have ended."""
        self.cores[0].record_completed_prompt(n, longest_output)

    def waited_for_prompts(self, seconds: float) -> None:
        """Count it once: of the first replica."""
        self.cores[0].waited_for_prompts(seconds)

    def prompts_are_missing(self) -> None:
        """Of all replicas."""
        for core in self.cores:
            core.prompts_are_missing()

    def observe(self, observer: StepObserver) -> None:
        """Tell `observer` of every turn of the whole from now on, and of nothing inside: steps are watched at `cores`.
        Any thread may ask for it.
        """
        with self._observers_lock:
            self._observers += (observer,)

    def stop_observing(self, observer: StepObserver) -> None:
        """Tell it no more. Does nothing when it is not there; any thread may ask for it."""
        with self._observers_lock:
            self._observers = tuple(other for other in self._observers if other is not observer)

    def metrics(self) -> list[Metric]:
        """Everything that is counted and measured, of each replica by its label "engine"; any thread may ask."""
        found: dict[str, list[Any]] = {}
        for core in self.cores:
            for metric in core.metrics():
                found.setdefault(metric.name, []).append(metric)
        return [metric for metrics in found.values() for metric in metrics]

    def stats(self) -> EngineStats:
        """The few numbers of it that are shown while the engine runs, of all replicas; any thread may ask."""
        return total_stats([core.stats() for core in self.cores])

    def shutdown(self) -> None:
        """End every request and free the devices; idempotent."""
        if self._closed:
            return
        if any(threading.current_thread() is replica.thread for replica in self._replicas):
            # the collector found the engine dead in the middle of a turn, whose end this would wait for
            threading.Thread(target=self.shutdown, name="jaxllm shutdown").start()
            return
        self._closed = True
        for replica in self._replicas:
            if replica.turn is not None:
                self._end(replica)
            replica.close()
            replica.arrived.clear()
            replica.core.shutdown()
        self._of.clear()
        observers, self._observers = self._observers, ()
        for observer in observers:
            observer.engine_ends()
