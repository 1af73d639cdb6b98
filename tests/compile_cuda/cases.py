"""What is compiled, one case a program: every kernel's configurations, and two layers over pools of pages."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import pallas_kernels
from jaxllm.config.devices import GPU
from pallas_kernels.backend import device_backend
from pallas_kernels.batch import Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.configurations import Heads, Step
from pallas_kernels.paged_latent_attention.api import paged_latent_attention
from pallas_kernels.paged_latent_attention.configurations import DEEPSEEK_V3_OF_8, LatentStep

#: KV heads, head_dim, dtype and positions of the pages that two layers alone are compiled for
POOLS = (
    (1, 256, "bfloat16", 16),
    (1, 64, "float32", 64),
    (1, 96, "bfloat16", 64),
    (2, 128, "bfloat16", 64),
    (3, 64, "bfloat16", 16),
    (4, 80, "float32", 16),
    (8, 128, "bfloat16", 16),
)
#: blocks of such a pool
POOL_BLOCKS = (1_000, 10_000)
#: configurations of an operation in a quick run, at most
_QUICK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    #: bytes of arguments that the results must take over
    in_place_bytes: int
    #: bytes of the KV cache; 0: the program has none
    cache_bytes: int
    most_temporary_bytes: int | None
    #: that it goes through; None: it is no model's step
    layers: int | None = None
    #: of each layer's weights on a device
    layer_bytes: tuple[int, ...] = ()
    #: of all the weights that it takes, on a device
    weight_bytes: int = 0
    #: of the layers that are on the device at once, of those that are copied from the host
    fetched_bytes: int = 0
    #: whether it is one of an engine's programs, not a kernel by itself
    is_step: bool = False
    #: that it runs on, where these are not the one that is compiled for
    devices: tuple[Any, ...] = ()


def kernel_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Every configuration that `pallas_kernels.<operation>.api.configurations` tells; quick: some of each operation.

    Args:
        part: as in `step_cases`, of these.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    for configurations in _operations():
        known = {"device_kind": device.device_kind, "compute_capability": gpu.compute_capability}
        every = configurations(**{name: known[name] for name in inspect.signature(configurations).parameters})
        some = every[:: -(-len(every) // _QUICK)] if quick else every
        for case in some[part :: 1 if part is None else 2]:
            if not case.runs_on(gpu.compute_capability):
                continue
            arguments = case.shapes_on(sharding)
            donated = sum(device_bytes(arguments[i]) for i in case.donated)
            yield Case(
                name=f"{case.operation}: {case.label}",
                lower=lambda case=case, arguments=arguments: jax.jit(case.function, donate_argnums=case.donated).lower(
                    *arguments
                ),
                in_place_bytes=donated,
                cache_bytes=0,
                most_temporary_bytes=case.max_temporary_bytes,
            )


def _operations() -> list[Callable[..., Any]]:
    found = []
    for operation in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        # the libraries of CPU kernels are no operation
        if operation.ispkg and importlib.util.find_spec(f"{operation.name}.api"):
            api = importlib.import_module(f"{operation.name}.api")
            if hasattr(api, "configurations"):
                found.append(api.configurations)
    return found


def pool_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Two layers, which write keys and values and attend to them: pages of several shapes, in pools of two sizes.

    Args:
        part: as in `step_cases`, of the shapes.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    backend = device_backend(device)

    def step(cache: Any, query: Any, new: Any, batch: Any) -> Any:
        def layer(carry: tuple[Any, Any], place: Layout) -> tuple[tuple[Any, Any], None]:
            cache, query = carry
            cache, _ = write_kv(cache, new, new, place, batch)
            return (cache, paged_attention(query, cache, place, batch, scale=1.0)), None

        places: Any = np.array([[0, 0], [0, cache.shape[0] // 2], [1000, 1000]], np.int32)
        return jax.lax.scan(layer, (cache, query), Layout(*places))[0]

    for kv_heads, head_dim, dtype, block_size in (POOLS[:2] if quick else POOLS)[part :: 1 if part is None else 2]:
        heads = Heads(model="layers", heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
        for num_blocks in POOL_BLOCKS:
            page = 2 * kv_heads * block_size * head_dim * jax.numpy.dtype(dtype).itemsize
            about = Step(
                heads=heads,
                tokens=8,
                seqs=8,
                query=dtype,
                stored=dtype,
                block_size=block_size,
                context=1024,
                cache_bytes=2 * num_blocks * page,
                decode_only=True,
            )
            query, new = (
                jax.ShapeDtypeStruct((8, number, head_dim), jax.numpy.dtype(dtype))
                for number in (2 * kv_heads, kv_heads)
            )
            arguments = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
                (about.cache()[0], query, new, about.batch(backend)),
            )
            size = "" if num_blocks == POOL_BLOCKS[0] else f", {num_blocks} blocks"
            yield Case(
                name=f"pool of pages: {kv_heads} KV heads of {head_dim}, blocks of {block_size} in {dtype}{size}",
                lower=lambda arguments=arguments: jax.jit(step, donate_argnums=0).lower(*arguments),
                in_place_bytes=device_bytes(arguments[0]),
                cache_bytes=device_bytes(arguments[0]),
                most_temporary_bytes=None,
            )


def latent_pool_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Two layers, which write latents and attend to them, in pools of two sizes.

    Args:
        part: of the single shape that there is, 1 has none.
    """
    if part == 1:
        return
    sharding = jax.sharding.SingleDeviceSharding(device)
    heads, backend, value_width = DEEPSEEK_V3_OF_8, device_backend(device), 512

    def step(cache: Any, query: Any, batch: Any) -> Any:
        def layer(carry: tuple[Any, Any], place: Layout) -> tuple[tuple[Any, Any], None]:
            cache, query = carry
            cache, _ = write_kv(cache, query[:, :1], None, place, batch)
            seen = paged_latent_attention(query, cache, place, batch, scale=1.0, value_width=value_width)
            return (cache, query.at[..., :value_width].set(seen)), None

        places: Any = np.array([[0, 0], [0, cache.shape[0] // 2], [1000, 1000]], np.int32)
        return jax.lax.scan(layer, (cache, query), Layout(*places))[0]

    for num_blocks in POOL_BLOCKS:
        about = LatentStep(
            heads=heads,
            tokens=8,
            seqs=8,
            context=1024,
            cache_bytes=2 * num_blocks * 64 * heads.head_dim * 2,
            decode_only=True,
            value_width=value_width,
        )
        query = jax.ShapeDtypeStruct((8, heads.heads, heads.head_dim), jax.numpy.bfloat16)
        arguments = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            (about.cache()[0], query, about.batch(backend)),
        )
        size = "" if num_blocks == POOL_BLOCKS[0] else f", {num_blocks} blocks"
        yield Case(
            name=f"pool of latents: {heads.head_dim} numbers, blocks of 64 in bfloat16{size}",
            lower=lambda arguments=arguments: jax.jit(step, donate_argnums=0).lower(*arguments),
            in_place_bytes=device_bytes(arguments[0]),
            cache_bytes=device_bytes(arguments[0]),
            most_temporary_bytes=None,
        )


def device_bytes(tree: Any) -> int:
    """Of one device's parts of arrays, told as `jax.ShapeDtypeStruct`s with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
