"""The product with weights of eight bits, of a codebook, and with inputs in eight bits, against its formula in float64.

The bound is that of `test_quant_matmul`, and that of a codebook's numbers in x's type.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.quantized_case import Form, stacked

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.tiles import Tiles
from pallas_kernels.quant_matmul.triton import quant_matmul_triton
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.quantized import RoundedInputs

#: sizes that tiles divide and that they do not, one row of a weight, K shorter than a step and not a multiple of it
FORMS = {
    "int8": Form(kind="int8", k=200, n=24),
    "int8, one row": Form(kind="int8", k=24, n=1, scale_dtype="float16", x_dtype="float16"),
    "int8 in groups with zeros": Form(kind="int8", k=192, n=20, group=64, has_zeros=True),
    "int8, zeros of rows": Form(kind="int8", k=96, n=20, has_zeros=True, scale_dtype="bfloat16"),
    "float8": Form(kind="float8_e4m3fn", k=200, n=24),
    "float8 in blocks": Form(kind="float8_e4m3fn", k=256, n=20, group=128, x_dtype="float16"),
    "int8 by int8": Form(kind="int8", k=200, n=24, x_group=0),
    "float8 by float8": Form(kind="float8_e4m3fn", k=200, n=24, x_group=0),
    "float8 in blocks by float8 in groups": Form(kind="float8_e4m3fn", k=384, n=20, group=128, x_group=128),
    "nf4": Form(kind="nf4", k=192, n=20, group=64),
    "mxfp4": Form(kind="mxfp4", k=96, n=20, group=32),
}
ROWS = (1, 19)
TRITON = Backend(implementation="triton")


@functools.cache
def by_api(implementation: str, interpret: bool, layer: int | None = None) -> Any:
    backend = Backend(implementation=implementation, interpret=interpret)

    @jax.jit
    def product(x: jax.Array, weight: Any) -> jax.Array:
        if layer is None:
            return quant_matmul(x, weight, backend=backend)
        return quant_matmul(x, stacked(weight, 3, layer), backend=backend, layer=jnp.int32(layer))

    return product


def by_kernel(x: jax.Array, weight: Any, *, interpret: bool, backend: Backend = TRITON, split: int = 1) -> jax.Array:
    """With small tiles, of which several are needed."""
    walk = walk_of(weight, x.dtype, backend)
    assert walk is not None
    scales, dtype = None, x.dtype
    if isinstance(weight, RoundedInputs):
        x, scales = weight.codes(x, dtype=None if walk.native else x.dtype)
        weight = weight.weight
    tiles = Tiles(block_m=16, block_n=16, split_k=split, num_warps=4, num_stages=2)
    return quant_matmul_triton(x, weight, walk=walk, x_scales=scales, tiles=tiles, out_dtype=dtype, interpret=interpret)


def check(form: Form, rows: int, product: Any, *, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    weight, w64 = form.draw(draw)
    x = jnp.asarray(draw.normal(size=(rows, form.k)), form.x_dtype)
    x64 = form.rounded(np.asarray(x))
    out = np.asarray(product(x, weight), np.float64)
    expected, summed = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    eps = float(jnp.finfo(form.x_dtype).eps)
    bound = ((form.k + 4) * np.finfo(np.float32).eps + 2 * eps) * summed + eps * np.abs(expected)
    assert out.shape == (rows, form.n)
    assert np.all(np.abs(out - expected) <= bound)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_formula(name: str, implementation: str, interpret: bool):
    check(FORMS[name], ROWS[1], by_api(implementation, interpret))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMS)
def test_small_tiles_equal_the_formula(name: str, rows: int, interpret: bool):
    split = 2 if rows == 1 else 1
    check(FORMS[name], rows, functools.partial(by_kernel, interpret=interpret, split=split))
