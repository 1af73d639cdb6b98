"""The device side of a pooling engine: takes what the scheduler decided, launches the compiled step, gives back vectors
and classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.models.pooler import PoolingModel
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.heads.pooling_programs import PoolingPrograms
from jaxllm.runner.heads.pooling_rows import PackedPooling, PoolingRows
from jaxllm.runner.heads.pooling_step import PoolingState
from jaxllm.runner.memory.device_memory import DeviceMemory


class PoolingResult:
    """A launched step (`interface.StepFuture`)."""

    def __init__(self, results: jax.Array, tokens: jax.Array | None, packed: PackedPooling):
        self._results, self._tokens, self._packed = results, tokens, packed
        for array in (results, tokens):
            if array is not None:
                array.copy_to_host_async()

    def result(self) -> StepOutput:
        entries = self._packed.entries
        results = np.asarray(self._results)
        tokens = None if self._tokens is None else np.asarray(self._tokens)
        pooled: list[np.ndarray | None] = [None] * len(entries)
        for i, entry in enumerate(entries):
            if entry.tokens is not None:
                assert tokens is not None
                # steps are read in their order, so the pieces of earlier chunks are here already
                entry.pieces.append(tokens[entry.tokens].copy())
                if entry.ends:
                    pooled[i] = np.concatenate(entry.pieces)
            elif entry.ends:
                pooled[i] = results[entry.seq].copy()
        return StepOutput(token_ids=[], counts=[0] * len(entries), pooled=pooled)


class PoolingRunner(DeviceMemory[PoolingModel, PoolingState]):
    """One pooling model on its devices (`interface.ModelRunner`).

    Args:
        params: the model's weights, on the device; None: `restore_weights` reads them.
        reload: reads them anew.
        programs: compiled for the shapes of `params` and of its state, which is allocated here.
    """

    def __init__(
        self,
        params: PoolingModel | None,
        reload: Callable[[], PoolingModel],
        programs: PoolingPrograms,
        rows: PoolingRows,
    ):
        super().__init__(params, reload, programs)
        self._programs, self._rows = programs, rows
        self._buckets = tuple(programs.packings)

    def warm_up(self) -> None:
        """Run every program once on padding alone, so that nothing is left for the first request to load; on a CPU only
        the smallest bucket's (see `Runner.warm_up`).
        """
        on_cpu = all(device.platform == "cpu" for device in self._sharding.device_set)
        for bucket in self._buckets[:1] if on_cpu else self._buckets:
            self._launch(bucket, np.zeros(self._programs.packings[bucket].size, np.int32), want_tokens=True)
        jax.block_until_ready(self._live())

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size runs in."""
        return pick_bucket(self._buckets, num_tokens, num_seqs)

    def execute(self, scheduled: SchedulerOutput) -> PoolingResult:
        return self.forward(scheduled)

    def sample(self, launched: PoolingResult, masks: Mapping[int, np.ndarray]) -> PoolingResult:
        """Nothing is left to do: a pooling step is one program, and there is nothing that a mask could restrict."""
        return launched

    def forward(self, scheduled: SchedulerOutput) -> PoolingResult:
        for request in scheduled.admitted:
            self._rows.admit(request)
        for row, group, start, blocks in scheduled.new_blocks:
            self._rows.append_blocks(row, group, start, blocks)
        bucket = self.bucket(scheduled.num_tokens, len(scheduled.rows))
        packed = self._rows.pack(scheduled, self._programs.packings[bucket])
        return PoolingResult(*self._launch(bucket, packed.buffer, want_tokens=packed.want_tokens), packed)

    def _launch(self, bucket: Bucket, words: np.ndarray, *, want_tokens: bool) -> tuple[jax.Array, jax.Array | None]:
        buffer = jax.device_put(words, self._sharding)
        self._state, results, hidden = self._programs.pool(bucket)(self.params, self._live(), buffer)
        tokens = self._programs.tokens(bucket)(self._head, hidden, buffer) if want_tokens else None
        return results, tokens

    def _heads(self) -> None:
        self._head = None if self.params is None else self.params.head
