"""Kernels of which it is known what they need, to try the reading of machine code with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton_call import triton_call

from .cases import Case

_WARPS = 4


def probe_cases(device: Any) -> Iterator[Case]:
    sharding = jax.sharding.SingleDeviceSharding(device)

    def case(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> Case:
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
        return Case(
            name=f"probe: {name}",
            lower=lambda: jax.jit(function).lower(*arguments),
            in_place_bytes=0,
            cache_bytes=0,
            most_temporary_bytes=None,
        )

    for values in (64, 256):
        count = values * _WARPS * 32
        yield case(f"{values} values of each thread", _all_live, (count,), (count,))
    yield case("512 KiB of shared memory", _matmul, (256, 512), (512, 256), dtype=jnp.bfloat16)
    yield case("ends its process", _abort, (1,))
    yield case("the last", jnp.sin, (128,))


def _all_live(x: jax.Array, y: jax.Array) -> jax.Array:
    """Every value is in use until the last sum is known: a whole block in registers."""

    def kernel(x_ref, y_ref, out_ref):
        block = plt.load(x_ref)
        total = jnp.sum(block)
        for _ in range(2):
            total = jnp.sum(jnp.exp2(block * total))
        out_ref[...] = block * total + y_ref[...]

    return _call(kernel, x.shape)(x, y)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Both operands go through shared memory as a whole."""

    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = plt.dot(x_ref[...], y_ref[...])

    return _call(kernel, (x.shape[0], y.shape[1]))(x, y)


def _abort(x: jax.Array) -> jax.Array:
    os.abort()


def _call(kernel: Callable[..., None], shape: tuple[int, ...]) -> Callable[..., Any]:
    return triton_call(
        kernel,
        name="probe",
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(1,),
        num_warps=_WARPS,
        num_stages=1,
        interpret=False,
    )
