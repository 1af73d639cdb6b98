"""The head of replicas that step together: one launch of each program for all of them, each with its part of what the
launch brings and gives.

The parts lie one behind the other, as many words or rows for each replica. One that has nothing to do takes part with a
part of zeros, which is a step of no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.engine.step import AdmittedRequest, SchedulerOutput
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.heads.sampling import SamplingHead
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_rows import NOTHING_LOST, PackedStep, SamplingRows
from jaxllm.runner.heads.sampling_step import State
from jaxllm.runner.heads.step_results import StepResult
from jaxllm.runner.rows import Rows


class ReplicaStep(NamedTuple):
    """What one replica does in a step."""

    scheduled: SchedulerOutput
    rows: Rows
    #: as `ModelRunner.sample` takes them
    masks: Mapping[int, np.ndarray]


class JointHead(SamplingHead):
    """Samples for all replicas.

    Args:
        programs: whose `replicas` they are.
    """

    def __init__(self, programs: SamplingPrograms):
        super().__init__(programs)
        self._each = tuple(SamplingRows(programs) for _ in range(programs.replicas))
        self._empty = ConstraintShape(programs.config.model.vocab_size).empty(programs.max_num_seqs)
        # of each replica the first of its devices, whose parts are those of all others
        self._firsts = range(0, len(self._sharding.device_set), len(self._sharding.device_set) // programs.replicas)

    def admit_to(self, state: State, replica: int, request: AdmittedRequest) -> State:
        """Take a request into its row of a replica."""
        rows = self._each[replica]
        rows.admit(request)
        return self._write_tokens(state, request.row, rows.history(request), replica)

    def launch(self, state: State, steps: Mapping[int, ReplicaStep]) -> tuple[State, dict[int, StepResult]]:
        """Launch one step of all replicas.

        Args:
            steps: by replica, of those that have anything to do.

        Returns:
            (state, by replica what comes of its step).
        """
        programs = self.programs
        scheduled = [step.scheduled for step in steps.values()]
        bucket = programs.bucket_of_all([(step.num_tokens, len(step.rows)) for step in scheduled])
        packing = programs.packings[bucket]
        packed = {i: self._each[i].pack(step.scheduled, step.rows, packing) for i, step in steps.items()}
        lost = {
            i: self._each[i].restrict(packed[i], step.masks) if step.masks else NOTHING_LOST
            for i, step in steps.items()
        }

        def together(part: Callable[[PackedStep], np.ndarray | None], missing: np.ndarray) -> np.ndarray | None:
            """A field of all steps; None where none has it."""
            parts = {i: part(step) for i, step in packed.items()}
            if all(part is None for part in parts.values()):
                return None
            each = (parts.get(i) for i in range(programs.replicas))
            return np.concatenate([missing if part is None else part for part in each])

        size = packing.size + programs.sample_packing.size
        buffer = together(lambda step: step.buffer, np.zeros(size, np.int32))
        assert buffer is not None
        vectors = None
        if brought := [step.embeddings for step in packed.values() if step.embeddings is not None]:
            vectors = together(lambda step: step.embeddings, np.zeros_like(brought[0]))
        state, hidden, sampling = self._forward(state, bucket, buffer, vectors)
        sampled = scores = None
        if count := max(len(step.sampled_entries) for step in packed.values()):
            constraints = together(lambda step: step.constraints, self._empty)
            full = any(step.full for step in packed.values())
            state, sampled = self._sample(state, hidden, sampling, constraints, count, full)
        targets = together(lambda step: step.targets, np.zeros(1 + programs.config.max_scored_tokens, np.int32))
        if targets is not None:
            scores = self._score(hidden, targets)
        results = {}
        for i, step in packed.items():
            own = sampled if len(step.sampled_entries) else None
            found = None if step.targets is None else self._part(scores, i)
            loads = () if hidden.load is None else (self._part(hidden.load, i),)
            results[i] = StepResult(self._part(own, i), found, step, lost[i], self._part(hidden.sampled, i), loads)
        return state, results

    def _part(self, results: Any, replica: int) -> Any:
        """A replica's part of results, on one of its devices; no copy, and no program."""
        return jax.tree.map(lambda array: array.addressable_data(self._firsts[replica]), results)
