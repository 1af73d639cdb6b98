"""``jaxllm plan`` answers what goes where on each device, whether it fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

from jaxllm.runner.memory.plan import MemoryPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """An engine argument with which the model fits, and what is planned with it."""

    argument: str
    value: int | float | str
    plan: MemoryPlan

    def __str__(self) -> str:
        plan = self.plan
        gained = f"{plan.num_tokens:,} tokens of KV cache"
        if self.argument == "tensor_parallel_size":
            gained += f" on each of {self.value} devices"
        if self.argument == "cpu_offload_gb":
            gained += f", and each step copies {self.value} GiB from the host"
        return f"{self.argument}={self.value}: {gained}, {plan.max_concurrency:.2f}x {plan.max_model_len:,} tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an engine would need on devices that may not be there."""

    model: str
    #: as it was asked for
    device: str
    #: of each device; of one that does not fit, what there would be
    memory: MemoryPlan
    fits: bool
    #: why it does not fit; "" when it does
    problem: str
    #: each makes it fit by itself; empty when it fits
    remedies: tuple[Remedy, ...]
    #: what the devices exchange in a step, kind -> times
    collectives: dict[str, int]
    #: whether the compiler for the device gave the numbers
    exact: bool
    #: who gave the numbers
    basis: str

    def __str__(self) -> str:
        memory = self.memory
        exchanged = ", ".join(f"{number} {kind}" for kind, number in self.collectives.items())
        lines = [
            str(memory),
            f"  a token takes {memory.kv_bytes_per_token / 1024:g} KiB of KV cache"
            + (" on each device" if memory.tensor_parallel_size > 1 else ""),
        ]
        if memory.tensor_parallel_size > 1:
            lines[0] = f"Each of {memory.tensor_parallel_size} devices: {lines[0]}"
            lines.append(f"  a step exchanges {exchanged}")
        if memory.data_parallel_size > 1:
            lines[0] = f"Each of {memory.data_parallel_size} replicas: {lines[0]}"
        lines.append(self.verdict())
        lines += [f"  {remedy}" for remedy in self.remedies]
        lines.append(self.basis)
        return "\n".join(lines)

    def verdict(self) -> str:
        if self.fits:
            return "It fits."
        found = "Any one of these makes it fit:" if self.remedies else "No single argument makes it fit."
        return f"It does not fit. {self.problem}\n{found}"

    def _repr_html_(self) -> str:
        rest = str(self).removeprefix(str(self.memory))
        return f"{self.memory._repr_html_()}<pre>{html.escape(rest.strip())}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it; sizes are bytes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """Return the plan of a `to_dict`."""
        remedies = (Remedy(**{**remedy, "plan": MemoryPlan(**remedy["plan"])}) for remedy in fields["remedies"])
        return cls(**{**fields, "memory": MemoryPlan(**fields["memory"]), "remedies": tuple(remedies)})
