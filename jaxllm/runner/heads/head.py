"""What a step ends in: what becomes of the hidden states of its tokens, and what the host reads of that."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from jaxllm.engine.step import AdmittedRequest, SchedulerOutput, StepFuture
from jaxllm.models.adapters import Stacks
from jaxllm.multimodal.items import EncoderInput
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.heads.stage_clock import StageClock
from jaxllm.runner.memory.device_memory import Allocator
from jaxllm.runner.rows import Rows

Weights = TypeVar("Weights")
#: what lives on the device between steps: the cache, and what the head keeps of each row
State = TypeVar("State")


class Head(abc.ABC, Generic[Weights, State]):
    """The part of a runner that differs with what is asked of the model.

    It owns the compiled programs, the fields that a step's buffer has for it, what it must know of each row, and how
    results are read. Programs consume the state that they are given: methods take it and return the one that lives on.
    """

    programs: Programs

    @property
    def allocator(self) -> Allocator:
        """Makes the state."""
        return self.programs

    @abc.abstractmethod
    def use(self, params: Weights | None) -> None:
        """Launch programs with these weights from here on; None: they are not on the device."""

    @abc.abstractmethod
    def admit(self, state: State, request: AdmittedRequest) -> State:
        """Take a request into its row."""

    def keep_outputs(self, state: State, outputs: Sequence[list[int]]) -> State:
        """Keep what ended requests got, for later drafts; only a head with such drafts is asked to."""
        raise NotImplementedError

    def use_adapters(self, adapters: Sequence[Stacks]) -> None:
        """Launch programs of steps with adapters with these, of each stage of a pipeline, from here on."""
        raise NotImplementedError

    def encode(self, state: State, inputs: Sequence[EncoderInput]) -> State:
        """Encode items into the state; only a head whose model sees pictures is asked to."""
        raise NotImplementedError

    def forget_outputs(self) -> None:
        """The state is about to be made anew."""

    @abc.abstractmethod
    def forward(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> tuple[State, Any]:
        """Launch a step's first part; what is returned with the state goes to `sample`."""

    @abc.abstractmethod
    def sample(self, state: State, launched: Any, masks: Mapping[int, np.ndarray]) -> tuple[State, StepFuture]:
        """Launch what is left of a step (`ModelRunner.sample`)."""

    def decode_steps(self, state: State, scheduled: SchedulerOutput, rows: Rows) -> tuple[State, StepFuture]:
        """Launch several steps at once; only a head that feeds the model with its results is asked to."""
        raise NotImplementedError

    @abc.abstractmethod
    def warm_up(self, state: State, *, smallest: bool) -> State:
        """Run every program on padding alone, or those of the smallest bucket."""

    def caches(self, state: State) -> list[tuple[Programs, Any]]:
        """The KV cache, of each stage of a pipeline, with the programs of its devices."""
        held: Any = state
        return [(self.programs, held.cache)]

    def with_caches(self, state: State, caches: Sequence[Any]) -> State:
        """The state with these in place of `caches`."""
        held: Any = state
        return dataclasses.replace(held, cache=caches[0])

    def time_stages(self) -> StageClock | None:
        """Note from here on when each stage of a pipeline is done with each step; None: there are no stages."""
        return None

    def free(self) -> None:
        """Free the arrays that are the head's own."""
