"""Replicas of one model that step together: what each of them is told becomes one launch for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.engine.step import SchedulerOutput, StepFuture, StepOutput
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.joint import JointHead, ReplicaStep
from jaxllm.runner.memory.device_memory import DeviceMemory
from jaxllm.runner.rows import Rows


class JointStep:
    """A replica's part of a step (`engine.step.StepFuture`), from when it is told until it is read."""

    def __init__(self) -> None:
        self.launched: StepFuture | None = None

    def result(self) -> StepOutput:
        if self.launched is None:
            raise RuntimeError("the step of all replicas was not launched; please report this")
        return self.launched.result()


class JointRunner(DeviceMemory[Any, Any]):
    """One model whose replicas step together: its weights, and the state of all of them.

    Args:
        params, reload: as `Runner` takes them.
        rows: of each replica.
    """

    def __init__(self, params: Any, reload: Callable[[], Any], head: JointHead, rows: Sequence[Rows]):
        self.head, self._rows = head, tuple(rows)
        self._steps: dict[int, tuple[ReplicaStep, JointStep]] = {}
        super().__init__(params, reload, head.allocator)

    @property
    def replicas(self) -> tuple[ReplicaRunner, ...]:
        """What each replica's engine core launches its steps with."""
        return tuple(ReplicaRunner(self, number) for number in range(len(self._rows)))

    def warm_up(self) -> None:
        """As `Runner.warm_up`."""
        on_cpu = all(device.platform == "cpu" for device in self._sharding.device_set)
        self._state = self.head.warm_up(self._live(), smallest=on_cpu)
        jax.block_until_ready(self._state)

    def admit(self, replica: int, scheduled: SchedulerOutput) -> None:
        """Take in who enters a row of a replica, and the blocks that rows get."""
        self._rows[replica].update(scheduled)
        for request in scheduled.admitted:
            self._state = self.head.admit_to(self._live(), replica, request)

    def tell(self, replica: int, scheduled: SchedulerOutput, masks: Mapping[int, np.ndarray]) -> JointStep:
        """What a replica does in the step that `launch` launches."""
        told = JointStep()
        self._steps[replica] = ReplicaStep(scheduled, self._rows[replica], masks), told
        return told

    def launch(self) -> None:
        """Launch the step of all replicas, if any of them has been told one; does not wait for it."""
        steps, self._steps = self._steps, {}
        if not steps:
            return
        self._state, launched = self.head.launch(self._live(), {i: step for i, (step, _) in steps.items()})
        for replica, (_, told) in steps.items():
            told.launched = launched[replica]

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in, if no other replica has a larger one."""
        return self.head.programs.bucket(num_tokens, num_seqs)

    def reset(self) -> None:
        self._steps.clear()
        super().reset()

    def _weights_changed(self) -> None:
        self.head.use(self.params)

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        super().shutdown()
        self.head.free()


class ReplicaRunner:
    """One replica of a `JointRunner` (`engine.step.ModelRunner`). Its steps are launched with those of the others, by
    `JointRunner.launch`; what concerns the memory of all, the engine cores ask for one after the other, and the first
    one's has it done.
    """

    def __init__(self, joint: JointRunner, number: int):
        self._joint, self._number = joint, number

    def execute(self, scheduled: SchedulerOutput) -> StepFuture:
        return self.sample(self.forward(scheduled), {})

    def forward(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        self._joint.admit(self._number, scheduled)
        return scheduled

    def sample(self, launched: SchedulerOutput, masks: Mapping[int, np.ndarray]) -> StepFuture:
        return self._joint.tell(self._number, launched, masks)

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """As `JointRunner.bucket`."""
        return self._joint.bucket(num_tokens, num_seqs)

    def time_stages(self) -> None:
        return None

    def reset(self) -> None:
        if self._number == 0:
            self._joint.reset()

    def free_cache(self) -> None:
        self._joint.free_cache()

    def free_weights(self, *, keep_on_host: bool) -> None:
        self._joint.free_weights(keep_on_host=keep_on_host)

    def restore_weights(self) -> None:
        self._joint.restore_weights()

    def shutdown(self) -> None:
        self._joint.shutdown()
