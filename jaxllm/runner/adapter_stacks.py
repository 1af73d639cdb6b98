"""The adapters that a runner has on its devices: a slot for each, written whole, by one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.layers.linear import PIECE
from jaxllm.layers.weight import is_spec
from jaxllm.models.adapters import EMBEDDING, HEAD, OWNED, Module, Stacks, Table
from jaxllm.parallel.processes import put_whole
from jaxllm.weights.loader import read_array
from jaxllm.weights.peft import OwnTable
from pallas_kernels.quantized import dense, is_quantized, rows

#: of an adapter, by the names of its modules: A [r, in], and B [out, r] with the scale in it; or a table
AdapterMatrices = Mapping[str, tuple[np.ndarray, np.ndarray] | OwnTable]


def write_adapter(stacks: Stacks, adapter: Stacks, slot: jax.Array) -> Stacks:
    """The stacks, donated, with an adapter in a slot, i32 [1]."""

    def written(axis: int, all: Any, new: Any) -> Any:
        return jax.tree.map(lambda all, new: lax.dynamic_update_index_in_dim(all, new, slot[0], axis), all, new)

    return Stacks(written(1, stacks.layers, adapter.layers), written(0, stacks.tables, adapter.tables))


def whole_table(table: Any, count: int) -> np.ndarray:
    """The first rows of a model's table [V, d]; of a quantized one some at a time: no device has room for all."""
    if not is_quantized(table):
        return np.asarray(table)[:count]
    columns = table.shape[-1]
    size, found = min(max(PIECE // columns, 1), count), np.empty((count, columns), np.float32)
    for start in range(0, count, size):
        # all are of one size, for which the device compiles once
        first = min(start, count - size)
        found[first : first + size] = dense(rows(table, first + np.arange(size)), jnp.dtype(jnp.float32))  # pyright: ignore
    return found


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
        tables: the tables that can be an adapter's own.
        rank: of each, at most.
        sharding: of what every device has whole.
    """

    def __init__(
        self,
        programs: Writer,
        specs: Stacks,
        modules: Mapping[str, Module],
        tables: Mapping[str, Table],
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
        #: kinds of tables -> (module, shape)
        self._tables = {table.kind: (module, table.shape) for module, table in tables.items()}
        self.arrays: Stacks = self._zeros()

    def _zeros(self) -> Stacks:
        def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
            part = functools.partial(np.zeros, dtype=shape.dtype)

            def own(index: Any) -> np.ndarray:
                sizes = (range(n)[at] for n, at in zip(shape.shape, index, strict=True))
                return part(tuple(map(len, sizes)))

            return jax.make_array_from_callback(shape.shape, shape.sharding, own)

        return jax.tree.map(zeros, self._programs.adapters)

    def write(self, slot: int, adapter: AdapterMatrices, params: Any) -> None:
        """Put an adapter into a slot, for the steps that are launched from here on.

        Args:
            params: the model's weights, of whose tables an adapter may have a change.
        """
        reader: Any = _Reader(self, adapter, params)
        read = functools.partial(read_array, reader, sharding=self._sharding, dtype=self._dtype)
        new = jax.tree.map(lambda spec: read(spec), self._specs, is_leaf=is_spec)
        number = put_whole(np.full(1, slot, np.int32), self._programs_sharding)
        self.arrays = self._programs.adapter_writer(self.arrays, new, number)

    @property
    def _programs_sharding(self) -> jax.sharding.Sharding:
        programs: Any = self._programs
        return programs.sharding

    def tensor(self, name: str, adapter: AdapterMatrices, params: Any) -> np.ndarray:
        """A or B of one part, zeros where the adapter has none: [rank, in], or [out, rank]. Or a table [V, d], or which
        tables there are, i32 [2].
        """
        if name == OWNED:
            kinds = (self._tables.get(kind, ("", ()))[0] in adapter for kind in (EMBEDDING, HEAD))
            return np.asarray(list(kinds), np.int32)
        if name in self._tables:
            return self._table(name, adapter, params)
        module, place = self._tensors[name]
        rank, rows = self._rank, place.part.shape[0]
        if module not in adapter:
            shape = (rank, place.part.shape[1]) if name == place.a else (rows, rank)
            return np.broadcast_to(np.zeros((), np.float32), shape)
        found = adapter[module]
        assert not isinstance(found, OwnTable)
        a, b = found
        if name == place.a:
            return np.concatenate([a, np.zeros((rank - len(a), a.shape[1]), a.dtype)])
        found = np.zeros((rows, rank), b.dtype)
        span, ours = place.part.in_tensor(0, rows)
        found[:, : b.shape[1]] = b[span][ours]
        return found

    def _table(self, kind: str, adapter: AdapterMatrices, params: Any) -> np.ndarray:
        module, shape = self._tables[kind]
        own = adapter.get(module)
        if own is None:
            return np.broadcast_to(np.zeros((), np.float32), shape)
        assert isinstance(own, OwnTable)
        table = own.whole
        if table is None:
            body = getattr(params, "body", params)
            base = body.embedding if kind == EMBEDDING or body.head is None else body.head
            # split over devices, it may go on behind the vocabulary
            table = whole_table(base, shape[0])
        if own.rows is None or own.columns is None:
            return table
        return table.astype(np.float32) + own.rows @ own.columns

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

    def __init__(self, stacks: AdapterStacks, adapter: AdapterMatrices, params: Any):
        self._stacks, self._adapter, self._params = stacks, adapter, params
        #: the tensor that was read last: each device asks for its part
        self._last: tuple[str, np.ndarray] | None = None

    def names(self) -> Iterable[str]:
        return ()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        found = self._tensor(name)
        return found if rows is None else found[rows]

    def _tensor(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            self._last = name, self._stacks.tensor(name, self._adapter, self._params)
        return self._last[1]
