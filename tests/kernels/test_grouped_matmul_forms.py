"""The grouped product with quantized weights, as it is chosen and with small tiles, against its formula in float64.

The bound is that of `test_quant_matmul_forms`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.quantized_case import Form, check_close, stacked
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.packed_matmul.cpu_ffi import load_grouped
from pallas_kernels.quantized import Reordered, RoundedInputs

FORMS = {
    "int4": Form(kind="int4", k=128, n=20, group=64, scale_dtype="float16"),
    "int8 by int8": Form(kind="int8", k=72, n=24, x_group=0),
    "float8 in blocks by float8 in groups": Form(kind="float8_e4m3fn", k=256, n=20, group=128, x_group=128),
    "mxfp4": Form(kind="mxfp4", k=96, n=20, group=32),
}
#: of the experts, of which some have no rows; the rows behind them belong to nobody
SIZES = (5, 0, 20, 1, 0)
ROWS = 29


def problem(form: Form) -> tuple[jax.Array, Any, np.ndarray, np.ndarray]:
    """(x, the weights, the same in float64, each row's group, -1 for those of nobody), what nobody reads NaN."""
    draw = np.random.default_rng(0)
    weight, w64 = form.draw(draw, len(SIZES))
    owner = np.concatenate([np.repeat(np.arange(len(SIZES)), SIZES), np.full(ROWS - sum(SIZES), -1)])
    x = form.inputs(draw, ROWS).at[owner < 0].set(jnp.nan)
    unused = jnp.asarray(SIZES) == 0

    def poisoned(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(unused.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf).astype(leaf.dtype)

    return x, jax.tree.map(poisoned, weight), w64, owner


def check(form: Form, product: Any) -> None:
    x, weight, w64, owner = problem(form)
    out = np.asarray(product(x, weight, jnp.asarray(SIZES, jnp.int32)), np.float64)
    np.testing.assert_array_equal(out[owner < 0], 0)
    for group, size in enumerate(SIZES):
        if size:
            own = owner == group
            check_close(form, out[own], np.asarray(x)[own], w64[group])


@pytest.mark.parametrize("name", FORMS)
def test_the_kernel_equals_the_formula(name: str, interpret: bool):
    """Of the layer of a stack that is meant, in place."""
    backend = Backend(implementation="triton", interpret=interpret)

    @jax.jit
    def product(x: jax.Array, weight: Any, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x, stacked(weight, 3, 1), sizes, backend=backend, layer=jnp.int32(1))

    check(FORMS[name], product)


def test_xla_equals_the_formula():
    check(FORMS["int8 by int8"], functools.partial(grouped_matmul, backend=Backend(implementation="xla")))


def with_cpu_kernel(weight: Any) -> Backend:
    own = weight.weight if isinstance(weight, RoundedInputs) else weight
    return Backend(cpu_grouped=load_grouped([own], jnp.dtype(jnp.bfloat16), KERNELS_FOLDER))


def test_a_cpu_kernel_multiplies_rounded_inputs():
    form = FORMS["float8 in blocks by float8 in groups"]
    x, weight, _, _ = problem(form)
    product = jax.jit(functools.partial(grouped_matmul, backend=with_cpu_kernel(weight)))
    assert "jaxllm_grouped_exact_fp8_128_float32" in product.lower(x, weight, jnp.asarray(SIZES, jnp.int32)).as_text()
    check(form, product)


@pytest.mark.parametrize("implementation", ["xla", "triton", "cpu_ffi"])
def test_each_expert_may_have_an_order_of_its_own(implementation: str, interpret: bool):
    """GPTQ's act-order: column i of what is stored is column order[i] of the matrix."""
    form, draw = FORMS["int4"], np.random.default_rng(1)
    orders = np.stack([draw.permutation(form.k) for _ in SIZES])
    x, weight, w64, owner = problem(form)
    own = implementation == "cpu_ffi"
    backend = with_cpu_kernel(weight) if own else Backend(implementation=implementation, interpret=interpret)
    product = jax.jit(functools.partial(grouped_matmul, backend=backend))
    weight = Reordered(weight, jnp.asarray(orders, jnp.int32))
    assert ("jaxllm_grouped" in product.lower(x, weight, jnp.asarray(SIZES, jnp.int32)).as_text()) == own
    out = np.asarray(product(x, weight, jnp.asarray(SIZES, jnp.int32)), np.float64)
    for group, size in enumerate(SIZES):
        if size:
            own = owner == group
            check_close(form, out[own], np.asarray(x)[own][:, orders[group]], w64[group])
