"""The adapters that a runner has on its devices: a slot for each, written whole, by one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.layers.weight import is_spec
from jaxllm.models.adapters import Module, Stacks
from jaxllm.parallel.processes import put_whole
from jaxllm.weights.loader import read_array

#: of an adapter, by the names of its modules: A [r, in], and B [out, r] with the scale in it
AdapterMatrices = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_adapter(stacks: Stacks, adapter: Stacks, slot: jax.Array) -> Stacks:
    """The stacks, donated, with an adapter in a slot, i32 [1]."""
    return jax.tree.map(lambda all, new: lax.dynamic_update_index_in_dim(all, new, slot[0], 1), stacks, adapter)


class Writer(Protocol):
    """Programs that write."""

    adapter_writer: Any
    #: shapes of the stacks, with their shardings
    adapters: Any


class AdapterStacks:
    """The stacks of one runner.

    Args:
        specs: of one adapter (`models.adapters.adapter_specs`).
        modules: the matrices that can have one.
        rank: of each, at most.
        sharding: of what every device has whole.
    """

    def __init__(
        self,
        programs: Writer,
        specs: Stacks,
        modules: Mapping[str, Module],
        *,
        rank: int,
        dtype: jnp.dtype,
        sharding: jax.sharding.Sharding,
    ):
        self._programs, self._specs, self._modules = programs, specs, modules
        self._rank, self._dtype, self._sharding = rank, dtype, sharding
        #: names of tensors -> (module, place), of what a reader is asked for
        self._tensors = {
            name: (module, place)
            for module, found in modules.items()
            for place in found.places
            for name in (place.a, place.b)
        }
        self.arrays: Stacks = self._zeros()

    def _zeros(self) -> Stacks:
        def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
            part = functools.partial(np.zeros, dtype=shape.dtype)

            def own(index: Any) -> np.ndarray:
                sizes = (range(n)[at] for n, at in zip(shape.shape, index, strict=True))
                return part(tuple(map(len, sizes)))

            return jax.make_array_from_callback(shape.shape, shape.sharding, own)

        return jax.tree.map(zeros, self._programs.adapters)

    def write(self, slot: int, adapter: AdapterMatrices) -> None:
        """Put an adapter into a slot, for the steps that are launched from here on."""
        reader: Any = _Reader(self, adapter)
        read = functools.partial(read_array, reader, sharding=self._sharding, dtype=self._dtype)
        new = jax.tree.map(lambda spec: read(spec), self._specs, is_leaf=is_spec)
        number = put_whole(np.full(1, slot, np.int32), self._programs_sharding)
        self.arrays = self._programs.adapter_writer(self.arrays, new, number)

    @property
    def _programs_sharding(self) -> jax.sharding.Sharding:
        programs: Any = self._programs
        return programs.sharding

    def tensor(self, name: str, adapter: AdapterMatrices) -> np.ndarray:
        """A or B of one part, zeros where the adapter has none: [rank, in], or [out, rank]."""
        module, place = self._tensors[name]
        rank, rows = self._rank, place.part.shape[0]
        if module not in adapter:
            shape = (rank, place.part.shape[1]) if name == place.a else (rows, rank)
            return np.broadcast_to(np.zeros((), np.float32), shape)
        a, b = adapter[module]
        if name == place.a:
            return np.concatenate([a, np.zeros((rank - len(a), a.shape[1]), a.dtype)])
        found = np.zeros((rows, rank), b.dtype)
        span, ours = place.part.in_tensor(0, rows)
        found[:, : b.shape[1]] = b[span][ours]
        return found

    @property
    def is_freed(self) -> bool:
        return any(array.is_deleted() for array in jax.tree.leaves(self.arrays))

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self.arrays) if not array.is_deleted())

    def reset(self) -> None:
        """Make them anew, empty."""
        self.free()
        self.arrays = self._zeros()

    def free(self) -> None:
        for array in jax.tree.leaves(self.arrays):
            if not array.is_deleted():
                array.delete()


class _Reader:
    """An adapter as `weights.loader.WeightReader`, of the tensors that the stacks are made of."""

    def __init__(self, stacks: AdapterStacks, adapter: AdapterMatrices):
        self._stacks, self._adapter = stacks, adapter

    def names(self) -> Iterable[str]:
        return ()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stacks.tensor(name, self._adapter).shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        found = self._stacks.tensor(name, self._adapter)
        return found if rows is None else found[rows]
