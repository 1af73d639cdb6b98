"""The device side of the engine: takes what the scheduler decided, launches the compiled step, gives back what the
head makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.engine.step import SchedulerOutput, StepFuture, StepOutput
from jaxllm.runner.adapter_stacks import AdapterStacks
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.head import Head
from jaxllm.runner.heads.stage_clock import StageClock
from jaxllm.runner.memory.device_memory import DeviceMemory
from jaxllm.runner.memory.host_blocks import HostBlocks, Lot
from jaxllm.runner.padding_cost import PaddingCost
from jaxllm.runner.rows import Rows


class CopyingStep(NamedTuple):
    """A launched step that copies blocks to the host (`engine.step.StepFuture`)."""

    step: StepFuture
    lots: list[Lot]

    def result(self) -> StepOutput:
        output = self.step.result()
        for lot in self.lots:
            lot.arrive()
        return output


class Runner(DeviceMemory[Any, Any]):
    """One model on its devices (`engine.step.ModelRunner`).

    Args:
        params: the model's weights, on the device; None: `restore_weights` reads them.
        reload: reads them anew.
        head: what steps end in, with programs compiled for the shapes of the weights and of the state, which is
            allocated here.
        padding: told of every step; None: padding costs nothing to speak of.
        source: another runner of the model, whose weights these are.
        num_host_blocks: blocks of the KV cache that the host's memory has room for.
        adapters: what requests may have, of each stage of a pipeline; (): they have none.
    """

    def __init__(
        self,
        params: Any,
        reload: Callable[[], Any],
        head: Head,
        rows: Rows,
        padding: PaddingCost | None = None,
        source: Runner | None = None,
        num_host_blocks: int = 0,
        adapters: Sequence[AdapterStacks] = (),
    ):
        self.head, self._rows, self._padding = head, rows, padding
        self._adapters = tuple(adapters)
        super().__init__(params, reload, head.allocator, source)
        self._use_adapters()
        #: of each cache (`Head.caches`); [] where nothing is copied to the host
        self._host_blocks: list[HostBlocks] = []
        if num_host_blocks:
            self._host_blocks = [HostBlocks(part, num_host_blocks) for part, _ in head.caches(self._live())]
        #: of the step that is launched, on their way to the host
        self._leaving: list[Lot] = []

    def warm_up(self) -> None:
        """Run every program once on padding alone, so that nothing is left for the first request to load or
        allocate. On a CPU programs are loaded when they are compiled, and padding takes as long as tokens: there the
        smallest bucket is enough.
        """
        on_cpu = all(device.platform == "cpu" for device in self._sharding.device_set)
        self._state = self.head.warm_up(self._live(), smallest=on_cpu)
        caches = self.head.caches(self._live()) if self._host_blocks else []
        warm = [
            host.warm_up(cache, smallest=on_cpu) for host, (_, cache) in zip(self._host_blocks, caches, strict=True)
        ]
        if warm:
            self._state = self.head.with_caches(self._live(), warm)
        jax.block_until_ready(self._state)

    def execute(self, scheduled: SchedulerOutput) -> StepFuture:
        if not scheduled.goes_on_alone:
            return self.sample(self.forward(scheduled), {})
        self._admit(scheduled)
        self._state, future = self.head.decode_steps(self._live(), scheduled, self._rows)
        return self._with_copies(future)

    def forward(self, scheduled: SchedulerOutput) -> Any:
        self._admit(scheduled)
        if self._padding is not None:
            self._padding.count(scheduled.num_tokens, len(scheduled.rows))
        self._state, launched = self.head.forward(self._live(), scheduled, self._rows)
        return launched

    def sample(self, launched: Any, masks: Mapping[int, np.ndarray]) -> StepFuture:
        self._state, future = self.head.sample(self._live(), launched, masks)
        return self._with_copies(future)

    def _with_copies(self, future: StepFuture) -> StepFuture:
        """A step that is done when what it copies to the host is there as well."""
        lots, self._leaving = self._leaving, []
        return CopyingStep(future, lots) if lots else future

    def _copy(self, scheduled: SchedulerOutput) -> None:
        """Launch a step's copies of blocks: what is evicted leaves before anything is written."""
        copied = []
        for host, (_, cache) in zip(self._host_blocks, self.head.caches(self._live()), strict=True):
            self._leaving += host.copy_out(cache, scheduled.copies_out)
            copied.append(host.copy_in(cache, scheduled.copies_in))
        self._state = self.head.with_caches(self._live(), copied)

    def _admit(self, scheduled: SchedulerOutput) -> None:
        if scheduled.copies_out or scheduled.copies_in:
            self._copy(scheduled)
        if scheduled.adapter_loads:
            for slot, matrices in scheduled.adapter_loads:
                for stacks in self._adapters:
                    stacks.write(slot, matrices, self.params)
            self._use_adapters()
        self._rows.update(scheduled)
        if scheduled.ended_outputs:
            self._state = self.head.keep_outputs(self._live(), scheduled.ended_outputs)
        if scheduled.encoder_inputs:
            self._state = self.head.encode(self._live(), scheduled.encoder_inputs)
        for request in scheduled.admitted:
            self._state = self.head.admit(self._live(), request)

    def _use_adapters(self) -> None:
        if self._adapters:
            self.head.use_adapters([stacks.arrays for stacks in self._adapters])

    def time_stages(self) -> StageClock | None:
        """As `Head.time_stages`."""
        return self.head.time_stages()

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in."""
        return self.head.programs.bucket(num_tokens, num_seqs)

    def _weights_changed(self) -> None:
        self.head.use(self.params)

    @property
    def num_bytes(self) -> int:
        """What the weights, the state and the host's blocks take at present, wherever they are."""
        adapters = sum(stacks.num_bytes for stacks in self._adapters)
        return super().num_bytes + adapters + sum(host.num_bytes for host in self._host_blocks)

    def _restore_adapters(self) -> None:
        """Make the stacks that are freed anew, empty."""
        for stacks in self._adapters:
            if stacks.is_freed:
                stacks.reset()
        self._use_adapters()

    def free_weights(self, *, keep_on_host: bool) -> None:
        super().free_weights(keep_on_host=keep_on_host)
        for stacks in self._adapters:
            stacks.free()

    def restore_weights(self) -> None:
        super().restore_weights()
        self._restore_adapters()

    def reload_weights(self) -> None:
        # adapters stay where the scheduler knows them to be
        super().free_weights(keep_on_host=False)
        super().restore_weights()

    def reset(self) -> None:
        self._leaving.clear()
        self._restore_adapters()
        for host in self._host_blocks:
            host.forget_copies()
        self.head.forget_outputs()
        super().reset()

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        super().shutdown()
        for stacks in self._adapters:
            stacks.free()
        self._host_blocks, self._leaving = [], []
        self.head.free()
