"""Arrays that lie in the host's memory, from which their devices copy them (`models.offloaded`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.models.offloaded import HOST
from jaxllm.parallel.mesh import make_mesh


class _DescribedHostMemory(jax.sharding.NamedSharding):
    """Of devices that are only described: JAX asks a device for its memories, these have none to tell, and the kind
    would be forgotten.
    """

    @property
    def memory_kind(self) -> str:
        return HOST

    def update(self, **kwargs: Any) -> _DescribedHostMemory:
        return _DescribedHostMemory(kwargs.get("mesh", self.mesh), kwargs.get("spec", self.spec))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DescribedHostMemory) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((super().__hash__(), HOST))


def on_host(sharding: jax.sharding.Sharding) -> jax.sharding.NamedSharding:
    """The same parts of an array, each in the memory of its device's host. A single device becomes a mesh of one: of
    other shardings a traced function does not know the memory.
    """
    spec = jax.P()
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    else:
        [device] = sharding.device_set
        mesh = make_mesh(np.array([device], dtype=object))
    found = jax.sharding.NamedSharding(mesh, spec, memory_kind=HOST)
    return found if found.memory_kind == HOST else _DescribedHostMemory(mesh, spec)


def with_layers_on_host(shardings: Any, sizes: Sequence[int], layers: Collection[int]) -> Any:
    """A model's shardings, of each array, with those of some layers in the host's memory.

    Args:
        shardings: of the form of a model's params, or of what has them as its `body`.
        sizes: layers of each segment.
        layers: numbers of those layers, each of which is a segment.
    """
    if hasattr(shardings, "body"):
        return dataclasses.replace(shardings, body=with_layers_on_host(shardings.body, sizes, layers))
    segments = zip(shardings.layers, itertools.accumulate(sizes[:-1], initial=0), strict=True)
    moved = (jax.tree.map(on_host, segment) if first in layers else segment for segment, first in segments)
    return dataclasses.replace(shardings, layers=tuple(moved))
