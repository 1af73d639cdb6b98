"""How long steps take at least on a GPU that need not be there: what they read, compute and exchange, at its rates.

A step takes what takes longest of reading (weights once, keys and values of what is attended to), computing (the
products with weights, and attention's) and copying layers from the host's memory, and then its exchanges: the roofline
of Williams et al. 2009. No program reaches it; `efficiency` is the share of it that steps are taken to have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxllm.engine.observe.step_shape import StepShape

#: the shares of the roofline between which steps are expected: at best all of it, and what XLA's programs with few
#: tokens have had on GPUs
BEST, LIKELY = 1.0, 0.6
#: the host's seconds of a step, and of each request in it: 0.13 ms at 32 requests, 0.75 at 256 (bench/results)
HOST, HOST_REQUEST = 5e-5, 2.7e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineSteps:
    """Of one replica; of several devices that share its layers, what each of them does."""

    #: as it is shown
    device: str
    #: bytes and operations a second
    memory_bandwidth: float
    flops: float
    #: (tokens, requests) of a program -> bytes of weights that a device reads, operations of its products with them,
    #: and the seconds of its exchanges and of its copies from the host
    work: Callable[[int, int], tuple[float, float, float, float]]
    #: of keys and values of a token in the cache, of all layers, on one device
    kv_bytes: float
    #: operations for each pair of a token and one that it attends to, of all layers, on one device
    pair_flops: float
    #: of keys and values that a chunk's tokens share when they are read
    chunk_tile: int = 64
    efficiency: float = LIKELY
    basis: str = ""

    def device_seconds(self, shape: StepShape) -> float:
        size, flops, exchanged, copied = self.work(shape.num_tokens, min(shape.num_tokens, shape.num_requests))
        steps = shape.num_steps
        read = steps * size + self.kv_bytes * (shape.decode_context + shape.chunk_pairs / self.chunk_tile)
        computed = steps * flops + self.pair_flops * (shape.decode_context + shape.chunk_pairs)
        rates = max(read / self.memory_bandwidth, computed / self.flops, steps * copied)
        return (rates + steps * exchanged) / self.efficiency

    def host_seconds(self, num_requests: int) -> float:
        return HOST + HOST_REQUEST * num_requests

    def with_efficiency(self, efficiency: float) -> RooflineSteps:
        """The same at another share of the roofline, in (0, 1]."""
        return dataclasses.replace(self, efficiency=efficiency)

    def __str__(self) -> str:
        return (
            f"a step takes what {self.device} needs for its bytes and operations, at {self.efficiency:.0%} of its "
            f"rates; nobody has measured it: expect between {LIKELY:.0%} and {BEST:.0%}, and longer steps of few "
            f"tokens. {self.basis}"
        ).strip()
