"""What a step reads, computes and exchanges, and how long each of these takes at least."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxllm.config.devices import GPU
from jaxllm.config.links import HOST_BANDWIDTH, LINKS, exchange_seconds
from jaxllm.parallel.collectives import Collective

_VOCAB = "vocab"
#: of hidden states, from a stage to the next one
COPY = "copy to the next stage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepExchange:
    """Collectives of one kind and size in a step."""

    #: such as "all-reduce", or `COPY`
    kind: str
    #: the logical axis that is split; "": the program does not say
    over: str
    #: in the step, and in each layer
    times: int
    times_a_layer: int
    #: that each of them gives a device
    bytes: int
    #: that take part
    devices: int
    #: of all of them, at least; None: nothing is known of the devices' links
    seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """What one device does in a step: the roofline, and what is exchanged beside it."""

    name: str
    #: of a pipeline; None: there is none
    stage: int | None
    tokens: int
    requests: int
    exchanges: tuple[StepExchange, ...]
    #: why its exchanges are those of the rules of the split; "": they were counted in its compiled programs
    not_compiled: str
    #: bytes of weights, each read once
    weight_bytes: int
    #: of the products with weights, two for each number and token; attention's are not among them
    flops: int
    #: at the device's memory bandwidth and bfloat16 rate; None: unknown
    read_seconds: float | None
    compute_seconds: float | None
    #: bytes of weights that are copied from the host's memory before, beside everything else, at the bandwidth of PCI
    #: Express; None: unknown
    copied_bytes: int = 0
    copy_seconds: float | None = None

    @property
    def exchange_seconds(self) -> float | None:
        """Of all exchanges; None where that of one is unknown."""
        seconds = [exchange.seconds for exchange in self.exchanges]
        return None if None in seconds else sum(second for second in seconds if second is not None)

    @property
    def seconds(self) -> float | None:
        """The least that the step takes: what takes longest of reading, computing and copying, then the exchanges."""
        parts = self.read_seconds, self.compute_seconds, self.copy_seconds, self.exchange_seconds
        if None in parts:
            return None
        *beside, exchanged = (part or 0.0 for part in parts)
        return max(beside) + exchanged

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StepEstimate:
        """Of a `dataclasses.asdict`, which may have been JSON since."""
        return cls(**{**fields, "exchanges": tuple(StepExchange(**exchange) for exchange in fields["exchanges"])})


def step_exchanges(
    found: Counter[Collective], *, num_layers: int, devices: int, gpu: GPU | None
) -> tuple[StepExchange, ...]:
    """What a step exchanges, most bytes first.

    Args:
        found: of the step's programs together.
        devices: of the mesh.
        gpu: that the devices are; None: they are none that is known.
    """
    link = None if gpu is None else LINKS[gpu.name]
    exchanges = []
    for each, times in found.items():
        group = each.devices or devices
        seconds = None if link is None else times * exchange_seconds(each.kind, each.bytes, group, link)
        exchanges.append(
            StepExchange(
                kind=each.kind,
                over=each.over,
                times=times,
                times_a_layer=0 if each.over == _VOCAB else times // num_layers,
                bytes=each.bytes,
                devices=group,
                seconds=seconds,
            )
        )
    return tuple(sorted(exchanges, key=lambda exchange: -exchange.times * exchange.bytes))


def handed_on(size: int, gpu: GPU | None) -> StepExchange:
    """The copy of a step's hidden states to the next stage, to each of its devices from one, beside each other.

    Args:
        size: bytes.
    """
    seconds = None if gpu is None else size / LINKS[gpu.name].bandwidth
    return StepExchange(kind=COPY, over="", times=1, times_a_layer=0, bytes=size, devices=2, seconds=seconds)


def step_estimate(
    name: str,
    *,
    stage: int | None,
    tokens: int,
    requests: int,
    exchanges: tuple[StepExchange, ...],
    not_compiled: str,
    weight_bytes: int,
    flops: int,
    copied_bytes: int,
    gpu: GPU | None,
) -> StepEstimate:
    """A step's roofline (Williams et al. 2009): it takes no less than its bytes need at the memory's bandwidth, nor
    than its products need at the rate of the device's matrix units.
    """
    return StepEstimate(
        name=name,
        stage=stage,
        tokens=tokens,
        requests=requests,
        exchanges=exchanges,
        not_compiled=not_compiled,
        weight_bytes=weight_bytes,
        flops=flops,
        read_seconds=None if gpu is None else weight_bytes / gpu.memory_bandwidth,
        compute_seconds=None if gpu is None else flops / gpu.bf16_flops,
        copied_bytes=copied_bytes,
        copy_seconds=None if gpu is None else copied_bytes / HOST_BANDWIDTH[gpu.name],
    )
