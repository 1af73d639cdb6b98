"""What launches bring, as the host waits for it and reads it (`engine.step.StepFuture`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxllm.engine.step import LogprobArrays, StepOutput
from jaxllm.runner.heads.draft_steps import DraftSteps
from jaxllm.runner.heads.sampling_rows import NOTHING_LOST, PackedStep
from jaxllm.runner.heads.sampling_step import ENDED, Sampled
from jaxllm.sampling.logprobs import Logprobs


class StepResult:
    """A launched step (`engine.step.StepFuture`).

    Args:
        lost: entries whose masks could not be made, bool.
        computed: is ready when the step is done, also where nobody samples.
        loads: `Hidden.load`, of all stages; (): nobody counts.
        learn: told whether the host had to wait for the step, when it is done; None: nobody learns from it.
    """

    def __init__(
        self,
        sampled: Sampled | None,
        scores: Logprobs | None,
        packed: PackedStep,
        lost: np.ndarray,
        computed: jax.Array,
        loads: tuple[jax.Array, ...] = (),
        learn: Callable[[bool], None] | None = None,
    ):
        self._learn = learn
        self._sampled, self._scores, self._packed = sampled, scores, packed
        self._lost, self._computed, self._loads = lost, computed, loads
        wanted: list[Any] = [scores, *loads]
        if sampled is not None:
            wanted += [sampled.token_ids, self._logprobs]
        for array in jax.tree.leaves(wanted):
            array.copy_to_host_async()

    @property
    def _logprobs(self) -> Logprobs | None:
        """What somebody wants of the step's log-probabilities."""
        if self._sampled is None or self._sampled.logprobs is None or not self._packed.want_logprobs:
            return None
        found = self._sampled.logprobs
        return found if self._packed.want_chosen else dataclasses.replace(found, chosen=None)  # pyright: ignore

    def result(self) -> StepOutput:
        packed, sampled = self._packed, self._sampled
        if self._learn is not None:
            waited = not self._computed.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            self._computed.block_until_ready()
            self._learn(waited)
        if sampled is None:
            # else the host would run ahead through a long prompt: steps would pile up, and a trace could not time them
            self._computed.block_until_ready()
        rows, counts = packed.flat_rows(self._lost)
        scores = None
        if self._scores is not None and packed.targets is not None:
            scores = _arrays(jax.tree.map(lambda x: np.asarray(x)[: packed.targets[0]], self._scores))  # pyright: ignore
        found = self._logprobs
        return StepOutput(
            token_ids=[] if sampled is None else np.asarray(sampled.token_ids)[rows].tolist(),
            counts=counts,
            logprobs=None if found is None else _arrays(jax.tree.map(lambda x: np.asarray(x)[rows], found)),
            prompt_logprobs=scores,
            scored_counts=packed.scored_counts,
            errors=packed.errors(),
            expert_load=_whole_load(self._loads),
        )


class DraftStepsResult:
    """A launch with drafts (`engine.step.StepFuture`).

    Args:
        learn: told what steps the launch had, and whether the host had to wait for it; None: nobody learns from it.
    """

    def __init__(self, found: DraftSteps, packed: PackedStep, learn: Callable[[np.ndarray, bool], None] | None):
        self._learn = learn
        logprobs = found.logprobs if packed.want_logprobs else None
        if logprobs is not None and not packed.want_chosen:
            logprobs = dataclasses.replace(logprobs, chosen=None)  # pyright: ignore
        self._found, self._packed = dataclasses.replace(found, logprobs=logprobs), packed
        for array in jax.tree.leaves(self._found):
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        seqs, _ = self._packed.flat_rows(NOTHING_LOST)
        found = self._found
        if self._learn is not None:
            waited = not found.kinds.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            self._learn(np.asarray(found.kinds), waited)
        counts, ids = np.asarray(found.counts)[seqs], np.asarray(found.token_ids)[seqs]
        there = np.arange(ids.shape[1]) < counts[:, None]
        logprobs = jax.tree.map(lambda x: np.asarray(x)[seqs][there], found.logprobs)
        return StepOutput(
            token_ids=ids[there].tolist(),
            counts=counts.tolist(),
            logprobs=None if logprobs is None else _arrays(logprobs),
            drafted=np.asarray(found.drafted)[:, seqs].T,
            accepted=np.asarray(found.accepted)[:, seqs].T,
            expert_load=None if found.load is None else np.asarray(found.load),
        )


class DecodeStepsResult:
    """A launch of several steps (`engine.step.StepFuture`).

    Args:
        sampled: i32 [steps, S], as `decode_steps` returns it.
        loads: as of `StepResult`.
    """

    def __init__(self, sampled: jax.Array | np.ndarray, packed: PackedStep, loads: tuple[jax.Array, ...] = ()):
        self._sampled, self._packed, self._loads = sampled, packed, loads

    def result(self) -> StepOutput:
        rows, _ = self._packed.flat_rows(NOTHING_LOST)
        ids = np.asarray(self._sampled)[:, rows].T
        there = ids != ENDED
        return StepOutput(
            token_ids=ids[there].tolist(),
            counts=there.sum(axis=1).tolist(),
            errors=self._packed.errors(),
            expert_load=_whole_load(self._loads),
        )


def _whole_load(loads: tuple[jax.Array, ...]) -> np.ndarray | None:
    return np.concatenate([np.asarray(load) for load in loads]) if loads else None


def _arrays(found: Logprobs) -> LogprobArrays:
    return LogprobArrays(
        sampled=np.asarray(found.sampled),
        rank=np.asarray(found.rank),
        top_ids=np.asarray(found.top_ids),
        top=np.asarray(found.top),
        chosen=None if found.chosen is None else np.asarray(found.chosen),
    )
