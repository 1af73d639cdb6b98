"""The device side of the engine: takes what the scheduler decided, launches the compiled step, gives back what the
head makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.engine.step import SchedulerOutput, StepFuture
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.head import Head
from jaxllm.runner.heads.stage_clock import StageClock
from jaxllm.runner.memory.device_memory import DeviceMemory
from jaxllm.runner.padding_cost import PaddingCost
from jaxllm.runner.rows import Rows


class Runner(DeviceMemory[Any, Any]):
    """One model on its devices (`engine.step.ModelRunner`).

    Args:
        params: the model's weights, on the device; None: `restore_weights` reads them.
        reload: reads them anew.
        head: what steps end in, with programs compiled for the shapes of the weights and of the state, which is
            allocated here.
        padding: told of every step; None: padding costs nothing to speak of.
        source: another runner of the model, whose weights these are.
    """

    def __init__(
        self,
        params: Any,
        reload: Callable[[], Any],
        head: Head,
        rows: Rows,
        padding: PaddingCost | None = None,
        source: Runner | None = None,
    ):
        self.head, self._rows, self._padding = head, rows, padding
        super().__init__(params, reload, head.allocator, source)

    def warm_up(self) -> None:
        """Run every program once on padding alone, so that nothing is left for the first request to load or
        allocate. On a CPU programs are loaded when they are compiled, and padding takes as long as tokens: there the
        smallest bucket is enough.
        """
        on_cpu = all(device.platform == "cpu" for device in self._sharding.device_set)
        self._state = self.head.warm_up(self._live(), smallest=on_cpu)
        jax.block_until_ready(self._state)

    def execute(self, scheduled: SchedulerOutput) -> StepFuture:
        if scheduled.num_steps == 1:
            return self.sample(self.forward(scheduled), {})
        self._admit(scheduled)
        self._state, future = self.head.decode_steps(self._live(), scheduled, self._rows)
        return future

    def forward(self, scheduled: SchedulerOutput) -> Any:
        self._admit(scheduled)
        if self._padding is not None:
            self._padding.count(scheduled.num_tokens, len(scheduled.rows))
        self._state, launched = self.head.forward(self._live(), scheduled, self._rows)
        return launched

    def sample(self, launched: Any, masks: Mapping[int, np.ndarray]) -> StepFuture:
        self._state, future = self.head.sample(self._live(), launched, masks)
        return future

    def _admit(self, scheduled: SchedulerOutput) -> None:
        self._rows.update(scheduled)
        for request in scheduled.admitted:
            self._state = self.head.admit(self._live(), request)

    def time_stages(self) -> StageClock | None:
        """As `Head.time_stages`."""
        return self.head.time_stages()

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in."""
        return self.head.programs.bucket(num_tokens, num_seqs)

    def _weights_changed(self) -> None:
        self.head.use(self.params)

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        super().shutdown()
        self.head.free()
