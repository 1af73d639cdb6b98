"""Layers whose weights lie in the host's memory (`cpu_offload_gb`), and come to the device while others are computed.

Whole layers, each a segment of its own (`models.segments`), spread evenly: while a layer that was copied is computed,
and those behind it that stay, the next one is on its way. So two of them are on the device at once, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.core
from jax import lax

Carry = TypeVar("Carry")

#: JAX's name of the memory that a device copies from by itself
HOST = "pinned_host"


def lies_on_host(tree: Any) -> bool:
    """Whether a tree of arrays lies in the host's memory. They may also be shapes with shardings, or what stands for
    arrays while a function is traced: of those JAX knows the memory where they have a `NamedSharding`.
    """
    array = jax.tree.leaves(tree)[0]
    if isinstance(array, jax.core.Tracer):
        return jax.typeof(array).memory_space == jax.memory.Space.Host
    return getattr(getattr(array, "sharding", None), "memory_kind", None) == HOST


def offloaded_layers(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """The numbers of as many layers, evenly spread, as have no more than `most` bytes; () where no layer is so small.

    Args:
        sizes: bytes of each layer.
    """
    total = len(sizes)
    for number in range(total, 0, -1):
        # the last of each of so many equal parts
        chosen = tuple(-(-part * total // number) - 1 for part in range(1, number + 1))
        if sum(sizes[layer] for layer in chosen) <= most:
            return chosen
    return ()


def fetch(segment: Any, carry: Carry) -> tuple[Any, Carry]:
    """A segment's weights, copied to the device once what `carry` begins with has been computed: without something to
    wait for, all copies could begin with the step, and all layers be there at once.

    Args:
        carry: a tree whose first array is what the next layer takes.

    Returns:
        (segment, carry): the carry that the next layer takes must be this one.
    """
    leaves, tree = jax.tree.flatten(carry)
    segment, leaves[0] = lax.optimization_barrier((segment, leaves[0]))
    here = jax.tree.map(lambda array: jax.device_put(array, jax.memory.Space.Device), segment)
    return here, tree.unflatten(leaves)
