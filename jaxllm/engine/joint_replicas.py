"""Several copies of the model that step together, as one engine: they have its experts between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxllm.engine.replicas import Replicas

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.engine.core import EngineCore


class JointReplicas(Replicas):
    """`Replicas` that take their turns in one thread, together: each decides its step, one launch is of all of them,
    and each reads its own part. One that has nothing to do takes part, without tokens.

    What fails fails for all, as in an engine of one copy: every request ends, and `step` raises.

    Args:
        launch: launches what the cores' runners have been told, if anything.
    """

    def __init__(self, cores: Sequence[EngineCore], launch: Callable[[], None]):
        super().__init__(cores)
        self._launch = launch

    def step(self) -> list[RequestOutput]:
        """One step of every replica that has work; returns what those bring that it is time to read."""
        self.check_runs()
        try:
            for observer in self._observers:
                observer.turn_begins()
            self.rest()
            cores = [core for core in self.cores if not core.is_idle]
            begun = [core.begin_step() for core in cores]
            self._launch()
            outputs: list[RequestOutput] = []
            # none waits for a grammar while another one has something to do
            waits = not any(outputs or core.has_launched for core, (outputs, _) in zip(cores, begun, strict=True))
            for core, (ended, launched) in zip(cores, begun, strict=True):
                outputs += ended + core.end_step(launched=launched)
            for observer in self._observers:
                observer.turn_ends()
            for core in cores if waits else ():
                core.wait()
        except BaseException:
            self.recover()
            raise
        return self._noted(outputs)

    def drain(self) -> list[RequestOutput]:
        """As `Replicas.drain`; fails as `step` does."""
        self.rest()
        try:
            return self._noted([output for core in self.cores for output in core.drain()])
        except BaseException:
            self.recover()
            raise
