"""The product with weights of eight bits, of a codebook, and with inputs in eight bits, against its formula in float64.

The bound is `check_close`'s. A codebook's numbers are rounded to x's type.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.quantized_case import Form, check_close, stacked

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.api import implementation_for, quant_matmul
from pallas_kernels.quant_matmul.tiles import Tiles
from pallas_kernels.quant_matmul.triton import quant_matmul_triton
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.quantized import Joined, RoundedInputs

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
    "int4 and rounded x": Form(kind="int4", k=128, n=20, group=64, x_group=0),
    "nf4": Form(kind="nf4", k=192, n=20, group=64),
    "mxfp4": Form(kind="mxfp4", k=96, n=20, group=32),
}
ROWS = (1, 19)
TRITON = Backend(implementation="triton")


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


def check(form: Form, rows: int, product: Any, *, rounds_weight: bool) -> None:
    draw = np.random.default_rng(0)
    weight, w64 = form.draw(draw)
    x = form.inputs(draw, rows)
    out = np.asarray(product(x, weight), np.float64)
    check_close(form, out, np.asarray(x), w64, rounds_weight=rounds_weight)


@pytest.mark.parametrize("name", ["int8 in groups with zeros", "float8 by float8", "nf4"])
def test_the_kernel_equals_the_formula(name: str, interpret: bool):
    """As it is chosen, of the layer of a stack that is meant, in place."""
    form, backend = FORMS[name], Backend(implementation="triton", interpret=interpret)

    def product(x: jax.Array, weight: Any) -> jax.Array:
        return quant_matmul(x, stacked(weight, 3, 1), backend=backend, layer=jnp.int32(1))

    check(form, ROWS[1], product, rounds_weight=form.kind == "nf4")


@pytest.mark.parametrize(("name", "rows"), [*((name, ROWS[1]) for name in FORMS), ("int8, one row", 1)])
def test_small_tiles_equal_the_formula(name: str, rows: int, interpret: bool):
    """Several of them, with K in two parts where it has several steps."""
    form = FORMS[name]
    product = functools.partial(by_kernel, interpret=interpret, split=2 if form.k > 128 else 1)
    check(form, rows, product, rounds_weight=form.kind == "nf4")


@pytest.mark.parametrize("name", ["float8 by float8", "float8 in blocks"])
def test_without_instructions_for_float8(name: str, interpret: bool):
    """Ampere has none: bits become numbers by arithmetic, and the rounded x is widened, too."""
    ampere = Backend(implementation="triton", compute_capability=(8, 0))
    product = functools.partial(by_kernel, interpret=interpret, backend=ampere)
    check(FORMS[name], ROWS[1], product, rounds_weight=False)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["int8 in groups with zeros", "float8 in blocks by float8 in groups", "mxfp4"])
def test_what_it_is_checked_against_equals_the_formula(name: str, implementation: str):
    product = functools.partial(quant_matmul, backend=Backend(implementation=implementation))
    check(FORMS[name], ROWS[1], product, rounds_weight=implementation == "xla")


def test_gradients_of_the_reference():
    form = FORMS["int8 in groups with zeros"]
    draw = np.random.default_rng(2)
    weight, w64 = form.draw(draw)
    x, cotangent = draw.normal(size=(3, form.k)), draw.normal(size=(3, form.n))

    def loss(x: jax.Array, scales: jax.Array) -> jax.Array:
        own = dataclasses.replace(weight, scales=scales)
        return jnp.vdot(quant_matmul(x, own, backend=Backend(implementation="reference")), cotangent)

    of_x, of_scales = jax.grad(loss, (0, 1))(jnp.asarray(x, jnp.float32), weight.scales)
    np.testing.assert_allclose(of_x, cotangent @ w64, rtol=1e-4, atol=1e-3)
    of_w = (cotangent.T @ x).reshape(form.n, -1, form.group)
    numbers = w64.reshape(of_w.shape) / np.asarray(weight.scales, np.float64)[..., None]
    np.testing.assert_allclose(of_scales, (of_w * numbers).sum(-1), rtol=1e-4, atol=1e-2)


def test_the_kernel_is_chosen_where_it_knows_the_way():
    draw, bf16 = np.random.default_rng(0), jnp.dtype(jnp.bfloat16)
    weights = {name: form.draw(draw)[0] for name, form in FORMS.items()}
    chosen = functools.partial(implementation_for, TRITON, dtype=bf16)
    assert {chosen(weight, rows=256) for weight in weights.values()} == {"triton"}
    # beyond, where both sides are multiplied in eight bits
    assert {name for name, weight in weights.items() if chosen(weight, rows=257) == "triton"} == {
        name for name in FORMS if " by " in name
    }
    odd = Form(kind="int8", k=96, n=8, group=48).draw(draw)[0]
    assert chosen(odd, rows=1) == chosen(Joined((odd, odd)), rows=1) == "xla"
    assert implementation_for(TRITON, weights["int8"], rows=1, dtype=jnp.dtype(jnp.float32)) == "xla"
