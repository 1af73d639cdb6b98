"""Arrays that are split over devices, whole in the host's memory, one at a time, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from jaxllm.layers.weight import Part, WeightSpec
from jaxllm.models.offloaded import lies_on_host
from jaxllm.parallel.rules import held, mesh_axes, mesh_sizes, place_on_mesh
from jaxllm.weights.loader import read_array


def is_split(spec: WeightSpec, sharding: jax.sharding.Sharding | None) -> bool:
    """Whether devices hold parts of an array, whose order is not the whole array's."""
    return any(mesh_axes(spec, mesh_sizes(sharding)))


def gather(spec: WeightSpec, array: jax.Array) -> np.ndarray:
    """The whole array, as one device would have it: without what is repeated or filled up."""
    if not is_split(spec, array.sharding):
        return np.asarray(array)
    whole = np.empty(spec.shape, array.dtype)
    for _, part, index in spec.places():
        found = gather_tensor(spec, array, part, index)
        whole[index] = found.T if spec.columns_first else found
    return whole


def gather_tensor(spec: WeightSpec, array: jax.Array, part: Part, index: tuple[int | slice, ...]) -> np.ndarray:
    """One part of an array that is split, rows first.

    Args:
        part, index: of `WeightSpec.places`.
    """
    whole, sizes = np.empty(part.shape, array.dtype), mesh_sizes(array.sharding)
    before = spec.parts[: spec.parts.index(part)]
    for shard in array.addressable_shards:
        numbers = place_on_mesh(spec, array.sharding, shard.index)
        first = sum(held(other.axes[0], sizes, numbers).size for other in before)
        own = [held(axis, sizes, numbers) for axis in part.axes]
        stacked = list(index[: -2 if spec.columns_first else -1])
        if spec.experts is not None:
            experts, number = held(spec.experts, sizes, numbers), stacked[-1]
            assert isinstance(number, int)
            if not experts.first <= number < experts.first + experts.count:
                continue
            stacked[-1] = number - experts.first
        rows = slice(first, first + own[0].count)
        held_here = np.asarray(shard.data) if lies_on_host(array) else shard.data
        mine = held_here[(*stacked, slice(None), rows)].T if spec.columns_first else held_here[(*stacked, rows)]
        whole[tuple(slice(axis.first, axis.first + axis.count) for axis in own)] = mine
    return whole


class _Whole:
    """A whole array as a checkpoint of its tensors."""

    def __init__(self, spec: WeightSpec, array: np.ndarray):
        self._tensors: Mapping[str, np.ndarray] = {name: array[index] for name, _, index in spec.places()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        assert within is None
        return self._tensors[name][slice(None) if rows is None else rows]


def scatter(spec: WeightSpec, whole: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """`gather`'s inverse: each device's part, copied.

    Args:
        sharding: of what every device has whole.
    """
    # each part is a tensor of its own here, whatever a checkpoint makes of them
    parts = (Part(f"{i} {{layer}} {{expert}}", part.axes) for i, part in enumerate(spec.parts))
    spec = dataclasses.replace(spec, parts=tuple(parts))
    return read_array(_Whole(spec, whole), spec, sharding, np.dtype(whole.dtype))
