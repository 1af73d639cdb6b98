"""Checkpoints into device arrays: each device's part of an array is read into the buffer that becomes it."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import math
import re
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from jaxllm.layers.weight import Part, WeightSpec, is_spec
from jaxllm.layers.weight_storage import MARK
from jaxllm.models.offloaded import HOST
from jaxllm.parallel.rules import (
    each_sharding,
    held,
    local_shape,
    mesh_axes,
    mesh_sizes,
    place_on_mesh,
    shape_and_sharding,
)
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.kv_cache import KV_SCALES

logger = logging.getLogger("jaxllm")

#: XLA:CPU uses a host buffer in place when it is aligned so
ALIGNMENT = 64
#: elements that are read at once, on their way into such a buffer; few enough to stay in the processor's cache
READ_PIECE = 2**20
#: random elements that are drawn at once: on their way they take several times their memory
PIECE = 2**21

_LAYER = re.compile(r"\.(?:layers?|h)\.\d+\.")
#: what old checkpoints of Llama and of the GPTs keep of the rotary embedding and of the mask; follows from the config
DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
#: ends of the tensors that are there in a matrix's place where it is quantized (GPTQ, AWQ; compressed-tensors)
_PACKED = (".qweight", ".weight_packed")


#: a model's specs, or something else of each
Tree = TypeVar("Tree")


class WeightReader(Protocol):
    """A checkpoint, one tensor at a time, under Hugging Face's names and in its orientation."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """All of a tensor, or some of its rows; `within` one of those that are stacked on its first axis."""
        ...


def load(
    reader: WeightReader,
    specs: Tree,
    dtype: jnp.dtype,
    sharding: Any,
    *,
    progress: bool,
    stop: threading.Event | None = None,
    num_threads: int = 1,
) -> Tree:
    """Read every array of the model. Each device's part is read and converted straight into the buffer that becomes it,
    and of each tensor only the rows that the part has.

    At most `READ_PIECE` elements are in host memory a second time, for each thread.

    Args:
        specs: a tree of `WeightSpec`s.
        dtype: of those that have none of their own.
        sharding: of what every device has whole, or a tree of them (`rules.each_sharding`).
        stop: set by another thread that does not want them any more, and here where one cannot be read.
        num_threads: that read, an array each; more than 1 where any thread may ask the reader.

    Raises:
        concurrent.futures.CancelledError: `stop` was set.
        WeightsError: a tensor is missing, has another shape than the config says, or belongs to a layer that does not
            use it; nothing has been read then.
    """
    specs, stop = as_stored(reader, specs), stop or threading.Event()
    check(reader, specs)
    scales = [name for name in reader.names() if name.endswith(KV_SCALES)]
    if scales:
        logger.info(
            "%d scales of keys and values (%s) are not read: a KV cache in 8 bits has its own.", len(scales), scales[0]
        )
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    bar = tqdm(total=len(leaves), desc="Loading weights", disable=not progress, leave=False)

    def one(spec: WeightSpec, sharding: jax.sharding.Sharding) -> jax.Array:
        array = read_array(reader, spec, sharding, dtype, stop)
        bar.update()
        return array

    shardings = jax.tree.leaves(each_sharding(specs, sharding))
    with bar, concurrent.futures.ThreadPoolExecutor(num_threads, "jaxllm-weights") as pool:
        reading = list(map(functools.partial(pool.submit, one), leaves, shardings))
        try:
            return jax.tree.unflatten(tree, [future.result() for future in reading])
        except BaseException:
            stop.set()
            raise


def as_stored(reader: WeightReader, specs: Tree) -> Tree:
    """The specs of the tensors that the checkpoint has, where a model's checkpoints have other ones at other times."""
    names = set(reader.names())
    return jax.tree.map(lambda spec: spec.as_stored(names), specs, is_leaf=is_spec)


def check(reader: WeightReader, specs: object) -> None:
    """Compare every tensor's name and shape with what the model needs."""
    specs = as_stored(reader, specs)
    names, used = set(reader.names()), set[str]()
    layers = set[str]()
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        for name, part in spec.tensors():
            if name not in names:
                module = name.partition(MARK)[0].removesuffix(".weight")
                packed = next((f"{module}{end}" for end in _PACKED if f"{module}{end}" in names), None)
                if packed is not None:
                    raise WeightsError(
                        f"the checkpoint has no tensor {name!r}, but a packed one, {packed!r}, and its config.json has "
                        "no quantization_config that says how: put in the one that the checkpoint was made with."
                    )
                raise WeightsError(f"the checkpoint has no tensor {name!r}, which the model's config asks for")
            used.add(name)
            shape = spec.tensor_shape(part)
            if reader.shape(name) != shape:
                raise WeightsError(
                    f"tensor {name!r} has shape {reader.shape(name)}, the model's config asks for {shape}"
                )
            if match := _LAYER.search(name):
                layers.add(name[: match.end()])
    for name in sorted(names - used):
        # layers that the config has not are left out on purpose; more in a layer means that it computes something else
        match = _LAYER.search(name)
        if match and name[: match.end()] in layers and not name.endswith((*DERIVED, *KV_SCALES)):
            raise WeightsError(f"the checkpoint has a tensor {name!r}, which the model's config has no use for")


def read_array(
    reader: WeightReader,
    spec: WeightSpec,
    sharding: jax.sharding.Sharding,
    dtype: jnp.dtype,
    stop: threading.Event | None = None,
) -> jax.Array:
    """An array on its devices. Of a tensor that they have columns of, each row is read once, for all of them.

    Args:
        sharding: of what every device has whole.
        dtype: if the spec has none of its own.
    """
    shape, own = shape_and_sharding(spec, sharding)
    assert own is not None
    sizes = mesh_sizes(sharding)
    *others, columns = mesh_axes(spec, sizes)
    shared = columns is not None and not any(others) and len(spec.parts[0].axes) > 1 and not spec.columns_first
    indices = own.addressable_devices_indices_map(shape).values() if shared else ()
    places: list[dict[str, int]] = []
    for index in indices:
        if (place := place_on_mesh(spec, sharding, index)) not in places:
            places.append(place)
    parts = read_parts(reader, spec, places, sizes, dtype, stop) if places else []

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        place = place_on_mesh(spec, sharding, index)
        if places:
            return parts[places.index(place)]
        return read_parts(reader, spec, [place], sizes, dtype, stop)[0]

    return jax.make_array_from_callback(shape, own, part)


def read_parts(
    reader: WeightReader,
    spec: WeightSpec,
    places: Sequence[Mapping[str, int]],
    sizes: Mapping[str, int],
    dtype: jnp.dtype,
    stop: threading.Event | None = None,
) -> list[np.ndarray]:
    """What some devices have of an array, each part in memory of its own.

    Args:
        places: of each device along the mesh's axes (`place_on_mesh`). All have the same rows of the same tensors.
        sizes: of the mesh's axes.
        dtype: if the spec has none of its own.
    """
    parts = [_aligned(local_shape(spec, sizes), jnp.dtype(spec.dtype or dtype)) for _ in places]
    experts = None if spec.experts is None else held(spec.experts, sizes, places[0])
    for i, layer in enumerate(spec.layers if spec.layers is not None else (0,)):
        for j in range(1 if experts is None else experts.count):
            at = (() if spec.layers is None else (i,)) + (() if experts is None else (j,))
            into = [part[at].T if spec.columns_first else part[at] for part in parts]
            for tensor in spec.parts:
                expert = 0 if experts is None else experts.first + j
                name = tensor.name.format(layer=layer, expert=expert)
                within = expert if spec.has_all_experts(tensor) else None
                rows = _fill(reader, tensor, name, within, places, sizes, into, stop)
                into = [part[rows:] for part in into]
    return parts


def _fill(
    reader: WeightReader,
    part: Part,
    name: str,
    within: int | None,
    places: Sequence[Mapping[str, int]],
    sizes: Mapping[str, int],
    outs: Sequence[np.ndarray],
    stop: threading.Event | None,
) -> int:
    """What devices have of a part, into the first rows of each one's `outs`. Returns how many they are."""
    own = [[held(axis, sizes, place) for axis in part.axes] for place in places]
    rows = own[0][0]
    columns = [tuple(slice(axis.first, axis.first + axis.count) for axis in axes[1:]) for axes in own]
    piece = max(READ_PIECE // math.prod(part.shape[1:]), 1)
    # where rows are columns there, they lie in all of it
    whole = None
    if part.transposed or part.scalar:
        whole = np.atleast_1d(reader.read(name, within=within)).T
    piece = piece if whole is None else rows.count
    for first in range(0, rows.count, piece):
        _raise_if(stop)
        last = min(first + piece, rows.count)
        span, ours = part.in_tensor(rows.first + first, rows.first + last)
        tensor = reader.read(name, span, within) if whole is None else whole[span]
        for out, wanted in zip(outs, columns, strict=True):
            out[first:last] = tensor[(ours, *wanted)]
    for out in outs:
        out[rows.count : rows.size] = 0
    return rows.size


def _raise_if(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise concurrent.futures.CancelledError


def dummy(
    specs: Tree,
    dtype: jnp.dtype,
    sharding: Any,
    seed: int = 0,
    *,
    stop: threading.Event | None = None,
) -> Tree:
    """Random weights made on the devices, each its own part: normal with deviation 0.02, norms that change nothing.
    They follow from the names of their tensors and the device's number, however layers are stacked or shared out.

    Args:
        sharding, stop: see `load`.
    """
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    # XLA's own generator: several times faster than JAX's default
    root = jax.random.key(seed, impl="rbg")
    shardings = jax.tree.leaves(each_sharding(specs, sharding))
    draw = jax.jit(_draw, static_argnums=(1, 2))

    def one(spec: WeightSpec, sharding: jax.sharding.Sharding) -> jax.Array:
        _raise_if(stop)
        sizes = mesh_sizes(sharding)
        own_dtype = jnp.dtype(spec.dtype or dtype)
        shape, own = shape_and_sharding(spec, sharding)
        assert own is not None
        if spec.init is not None:
            part = np.full(local_shape(spec, sizes), spec.init, own_dtype)
            return jax.make_array_from_callback(shape, own, lambda _: part)
        parts, names = [], _names_of_layers(spec)
        for device, index in own.addressable_devices_indices_map(shape).items():
            numbers = place_on_mesh(spec, sharding, index)
            at = jax.device_put(_own_keys(root, names, numbers), device)
            drawn = draw(at, local_shape(spec, sizes), own_dtype)
            if own.memory_kind == HOST:
                drawn = jax.device_put(drawn, jax.sharding.SingleDeviceSharding(device, memory_kind=HOST))
            parts.append(jax.block_until_ready(drawn))
        return jax.make_array_from_single_device_arrays(shape, own, parts)

    return jax.tree.unflatten(tree, list(map(one, leaves, shardings)))


def _names_of_layers(spec: WeightSpec) -> list[int]:
    """A number for the tensors of each layer."""
    layers = (0,) if spec.layers is None else spec.layers
    return [zlib.crc32(" ".join(part.name.format(layer=i, expert=0) for part in spec.parts).encode()) for i in layers]


def _own_keys(key: jax.Array, names: list[int], numbers: Mapping[str, int]) -> jax.Array:
    for number in numbers.values():
        key = jax.random.fold_in(key, number)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(np.asarray(names, np.uint32))


def _draw(keys: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal numbers, or integers that are all as likely, an equal part of each of the keys, some rows at a time: about
    `PIECE`, or more where no smaller number of rows divides them.
    """
    rows, width = math.prod(shape[:-1]) // len(keys), shape[-1]
    pieces = min(-(-rows * width // PIECE), rows)
    while rows % pieces:
        pieces += 1
    piece = rows // pieces, width

    def draw(key: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return lax.bitcast_convert_type(jax.random.bits(key, piece, jnp.uint8), dtype)
        return (0.02 * jax.random.normal(key, piece)).astype(dtype)

    drawn = lax.map(draw, jax.vmap(lambda key: jax.random.split(key, pieces))(keys).reshape(-1))
    return drawn.reshape(shape)


def _aligned(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
