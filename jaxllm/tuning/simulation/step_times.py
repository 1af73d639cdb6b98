"""How long a step takes is told by what it does."""

from __future__ import annotations

from typing import Protocol

from jaxllm.engine.observe.step_shape import StepShape


class StepTimes(Protocol):
    """Times in seconds."""

    def device_seconds(self, shape: StepShape) -> float:
        """Of a launch on the device."""
        ...

    def host_seconds(self, num_requests: int) -> float:
        """Of the host's work on a step with so many requests, during which the device may work on another one."""
        ...

    def __str__(self) -> str:
        """What a step takes, where that is from, and how far off it may be."""
        ...
