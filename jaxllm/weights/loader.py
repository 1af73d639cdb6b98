"""Checkpoints into device arrays: each array is filled slice by slice, in place, in the form its devices hold."""

from __future__ import annotations

import concurrent.futures
import math
import re
import threading
from collections.abc import Iterable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from jaxllm.models.sources import Source
from jaxllm.weights.errors import WeightsError

#: XLA:CPU uses a host buffer in place when it is aligned so
ALIGNMENT = 64
#: elements that are read at once, on their way into such a buffer; few enough to stay in the processor's cache
READ_PIECE = 2**20
#: random elements that are drawn at once
PIECE = 2**24

_LAYER = re.compile(r"\.layers?\.(\d+)\.")
#: what old Llama checkpoints keep of the rotary embedding; follows from the config
_DERIVED = ".rotary_emb.inv_freq"


#: a model's sources, or something else of each
Tree = TypeVar("Tree")


class WeightReader(Protocol):
    """A checkpoint, one tensor at a time, under Hugging Face's names and in its orientation."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...


def shapes(sources: Tree, dtype: jnp.dtype, sharding: jax.sharding.Sharding | None) -> Tree:
    """`jax.ShapeDtypeStruct`s of a model's arrays."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sharding), sources, is_leaf=_is_source)


def load(
    reader: WeightReader,
    sources: Tree,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
    *,
    progress: bool,
    stop: threading.Event | None = None,
) -> Tree:
    """Read every array of the model. Each device's part is read and converted straight into the buffer that becomes it.

    At most `READ_PIECE` elements are in host memory a second time.

    Args:
        stop: set by another thread that does not want them any more.

    Raises:
        concurrent.futures.CancelledError: `stop` was set.
        WeightsError: a tensor is missing, has another shape than the config says, or belongs to a layer that does not
            use it; nothing has been read then.
    """
    check(reader, sources)
    bar = tqdm(
        total=len(jax.tree.leaves(sources, is_leaf=_is_source)),
        desc="Loading weights",
        disable=not progress,
        leave=False,
    )

    def one(source: Source) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return _read(reader, source, index or (), dtype, stop)

        array = jax.make_array_from_callback(source.shape, sharding, part)
        bar.update()
        return array

    with bar:
        return jax.tree.map(one, sources, is_leaf=_is_source)


def check(reader: WeightReader, sources: object) -> None:
    """Compare every tensor's name and shape with what the model needs."""
    unused = set(reader.names())
    layers = 0
    for source in jax.tree.leaves(sources, is_leaf=_is_source):
        for name, part in source.tensors():
            if name not in unused:
                raise WeightsError(f"the checkpoint has no tensor {name!r}, which the model's config asks for")
            unused.remove(name)
            wanted = (part.rows,) if source.columns is None else (part.rows, source.columns)
            if reader.shape(name) != wanted:
                raise WeightsError(
                    f"tensor {name!r} has shape {reader.shape(name)}, the model's config asks for {wanted}"
                )
            if match := _LAYER.search(name):
                layers = max(layers, int(match[1]) + 1)
    for name in sorted(unused):
        # more layers than the config has are left out on purpose; more in a layer means that it computes something else
        match = _LAYER.search(name)
        if match and int(match[1]) < layers and not name.endswith(_DERIVED):
            raise WeightsError(f"the checkpoint has a tensor {name!r}, which the model's config has no use for")


def _read(
    reader: WeightReader,
    source: Source,
    index: tuple[slice, ...],
    dtype: jnp.dtype,
    stop: threading.Event | None = None,
) -> np.ndarray:
    """The slice `index` of a source, [layers, rows, columns] (without what it does not have)."""
    shape = source.shape
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
    out = _aligned(tuple(s.stop - s.start for s in index), dtype)
    if source.layers is None:
        _fill(reader, source, 0, index, out, stop)
    else:
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            _fill(reader, source, layer, index[1:], out[i], stop)
    return out


def _fill(
    reader: WeightReader,
    source: Source,
    layer: int,
    index: tuple[slice, ...],
    out: np.ndarray,
    stop: threading.Event | None,
) -> None:
    """One layer's part of a slice: the rows of each fused tensor that fall into it."""
    wanted, offset = index[0], 0
    piece = max(READ_PIECE // (source.columns or 1), 1)
    for part in source.parts:
        name = part.name.format(layer=layer)
        start, end = max(wanted.start, offset), min(wanted.stop, offset + part.rows)
        for first in range(start, end, piece):
            _raise_if(stop)
            last = min(first + piece, end)
            tensor = reader.read(name, slice(first - offset, last - offset))
            out[first - wanted.start : last - wanted.start] = tensor[:, index[1]] if len(index) > 1 else tensor
        offset += part.rows


def _raise_if(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise concurrent.futures.CancelledError


def dummy(
    sources: Tree,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
    seed: int = 0,
    *,
    stop: threading.Event | None = None,
) -> Tree:
    """Random weights made on the device: normal with deviation 0.02, norms that change nothing.

    Args:
        stop: see `load`.
    """
    leaves, tree = jax.tree.flatten(sources, is_leaf=_is_source)
    # XLA's own generator: several times faster than JAX's default
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    draw = jax.jit(_draw, static_argnums=(1, 2), out_shardings=sharding)

    def one(key: jax.Array, source: Source) -> jax.Array:
        _raise_if(stop)
        if source.norm_offset is not None:
            return jnp.full(source.shape, 1.0 - source.norm_offset, dtype, device=sharding)
        return jax.block_until_ready(draw(key, source.shape, dtype))

    return jax.tree.unflatten(tree, [one(key, source) for key, source in zip(keys, leaves, strict=True)])


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal numbers, about `PIECE` at a time: drawing them needs several times their memory."""
    pieces = min(-(-math.prod(shape) // PIECE), shape[0])
    while shape[0] % pieces:
        pieces += 1
    piece = (shape[0] // pieces, *shape[1:])
    drawn = lax.map(lambda k: (0.02 * jax.random.normal(k, piece)).astype(dtype), jax.random.split(key, pieces))
    return drawn.reshape(shape)


def _aligned(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _is_source(x: object) -> bool:
    return isinstance(x, Source)
