"""Every implementation of the four-bit product against its formula in float64, and the layout.

A bound of the error: K products summed in float32 (K * eps * sum |x| |w|), the roundings of a weight and its product
in float32 (2 eps), of the whole weight to x's type where it is unpacked, and one rounding to the result's type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.api import configurations, implementation_for, quant_matmul
from pallas_kernels.quant_matmul.layout import Int4Weight, dequantize, int4_weight, pack, unpack
from pallas_kernels.quant_matmul.tiles import Tiles, tiles_for
from pallas_kernels.quant_matmul.triton import quant_matmul_triton
from pallas_kernels.quant_matmul.walk import walk_of

#: (rows, K, N, group size, parts of K, x's dtype, the scales'): one row and many, N that tiles do not divide, parts
#: that do not divide the groups. Few, because each is compiled
SHAPES = (
    (1, 256, 40, 128, 1, "bfloat16", "bfloat16"),
    (20, 320, 32, 64, 2, "bfloat16", "float32"),
    (17, 160, 24, 32, 3, "float16", "float16"),
    (33, 96, 16, 32, 1, "float32", "float32"),
)
LAYERS, LAYER = 3, 1
NAMES = ("reference", "xla", "triton", "kernel", "triton stacked", "xla stacked")

Product = Callable[[jax.Array, Int4Weight], jax.Array]


def by_kernel(x: jax.Array, weight: Int4Weight, *, tiles: Tiles, interpret: bool) -> jax.Array:
    walk = walk_of(weight, jnp.dtype(jnp.bfloat16), Backend(implementation="triton"))
    assert walk is not None
    return quant_matmul_triton(x, weight, walk=walk, tiles=tiles, interpret=interpret)


@functools.cache
def implementation(name: str, interpret: bool, split: int) -> Product:
    if name == "kernel":
        tiles = Tiles(block_m=16, block_n=16, split_k=split, num_warps=4, num_stages=2)
        return jax.jit(functools.partial(by_kernel, tiles=tiles, interpret=interpret))
    kind, _, stacked = name.partition(" ")
    backend = Backend(implementation=kind, interpret=interpret)
    if not stacked:
        return jax.jit(functools.partial(quant_matmul, backend=backend))

    @jax.jit
    def of_stack(x: jax.Array, weight: Int4Weight) -> jax.Array:
        def stack(leaf: jax.Array) -> jax.Array:
            other = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
            return jnp.full((LAYERS, *leaf.shape), other, leaf.dtype).at[LAYER].set(leaf)

        return quant_matmul(x, jax.tree.map(stack, weight), backend=backend, layer=jnp.int32(LAYER))

    return of_stack


def formula(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """q [N, K], zeros and scales [K / g, N] -> the weight in float64."""
    group = np.arange(q.shape[1]) // (q.shape[1] // len(scales))
    return (q.astype(np.float64) - zeros[group].T) * scales[group].T.astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    zeros=st.sampled_from(["symmetric", "any", "largest"]),
    magnitude=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_equals_the_formula(name: str, interpret: bool, shape: tuple, seed: int, zeros: str, magnitude: float):
    rows, k, n, group_size, split, dtype, scale_dtype = shape
    draw = np.random.default_rng(seed)
    groups = k // group_size
    q = draw.integers(0, 16, (n, k))
    zero = {"symmetric": np.full((groups, n), 8), "largest": np.full((groups, n), 16)}.get(
        zeros, draw.integers(0, 17, (groups, n))
    )
    scales = jnp.asarray(draw.normal(size=(groups, n)), scale_dtype)
    x = jnp.asarray(draw.normal(size=(rows, k)) * magnitude, dtype)
    weight = int4_weight(pack(jnp.asarray(q), group_size), scales, jnp.asarray(zero, jnp.uint8))

    out = np.asarray(implementation(name, interpret, split)(x, weight), np.float64)

    w64, x64 = formula(q, zero, np.asarray(scales)), np.asarray(x, np.float64)
    expected, summed = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    kind, f32 = jnp.finfo(dtype), np.finfo(np.float32).eps
    relative = (k + 2) * f32 + (0 if name in ("reference", "kernel") else float(kind.eps))
    bound = relative * summed + float(kind.eps) * np.abs(expected) + float(kind.tiny)
    assert out.shape == (rows, n)
    assert np.all(np.abs(out - expected) <= bound)


def test_one_row_is_the_same_in_any_batch(interpret: bool):
    """As long as the tiles are: the sum over K takes no notice of the rows beside it."""
    _, k, n, group_size, *_ = SHAPES[1]
    draw = np.random.default_rng(0)
    groups = k // group_size
    weight = int4_weight(
        pack(jnp.asarray(draw.integers(0, 16, (n, k))), group_size),
        jnp.asarray(draw.normal(size=(groups, n)), jnp.float32),
        jnp.asarray(draw.integers(0, 16, (groups, n)), jnp.uint8),
    )
    x = jnp.asarray(draw.normal(size=(20, k)), jnp.bfloat16)
    product = implementation("kernel", interpret, 2)
    whole = np.asarray(product(x, weight), np.float32)
    np.testing.assert_array_equal(whole[7:8], np.asarray(product(x[7:8], weight), np.float32))
    nan_beside = np.asarray(product(x.at[8].set(jnp.nan), weight), np.float32)
    np.testing.assert_array_equal(np.delete(whole, 8, 0), np.delete(nan_beside, 8, 0))


def test_gradients_of_the_reference():
    rows, k, n, group_size, *_ = SHAPES[3]
    draw = np.random.default_rng(1)
    groups = k // group_size
    q, zeros = draw.integers(0, 16, (n, k)), draw.integers(0, 16, (groups, n))
    scales, x, cotangent = (draw.normal(size=size) for size in ((groups, n), (rows, k), (rows, n)))
    packed = pack(jnp.asarray(q), group_size)

    def loss(x: jax.Array, scales: jax.Array) -> jax.Array:
        weight = int4_weight(packed, scales, jnp.asarray(zeros, jnp.uint8))
        return jnp.vdot(quant_matmul(x, weight, backend=Backend(implementation="reference")), cotangent)

    of_x, of_scales = jax.grad(loss, (0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray(scales, jnp.float32))
    np.testing.assert_allclose(of_x, cotangent @ formula(q, zeros, scales), rtol=1e-4, atol=1e-3)
    of_w = cotangent.T @ x * formula(q, zeros, np.ones_like(scales))
    np.testing.assert_allclose(of_scales, of_w.reshape(n, groups, group_size).sum(-1).T, rtol=1e-4, atol=1e-2)


def test_the_worked_example_of_the_layout():
    q = jnp.asarray([[1, 2, 3, 4, 15, 0, 8, 7]])
    packed = pack(q, 4)
    np.testing.assert_array_equal(packed, [[0x31, 0x42, 0x8F, 0x70]])
    weight = int4_weight(packed, jnp.asarray([[0.5], [2.0]]), jnp.full((2, 1), 8, jnp.uint8))
    assert weight.shape == (1, 8) and weight.group_size == 4
    np.testing.assert_array_equal(dequantize(weight, jnp.dtype(jnp.float32)), [[-3.5, -3, -2.5, -2, 14, -16, 0, -2]])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([2, 32, 96]))
def test_packing_loses_nothing(seed: int, group_size: int):
    q = np.random.default_rng(seed).integers(0, 16, (2, 3, 96))
    packed = pack(jnp.asarray(q), group_size)
    assert packed.shape == (2, 3, 48) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, group_size), q)


def test_what_does_not_fit_is_refused():
    half = functools.partial(jnp.ones, dtype=jnp.float16)
    integer = functools.partial(jnp.zeros, dtype=jnp.int32)
    byte = functools.partial(jnp.zeros, dtype=jnp.uint8)
    with pytest.raises(ValueError, match="group_size must be even and divide K = 64, got 48"):
        pack(byte((8, 64)), 48)
    with pytest.raises(ValueError, match="packed must be uint8, got int32"):
        int4_weight(integer((8, 32)), half((2, 8)), byte((2, 8)))
    with pytest.raises(ValueError, match=r"needs scales \[..., K / g, N\].* got \(2, 9\)"):
        int4_weight(byte((8, 32)), half((2, 9)), byte((2, 9)))
    weight = int4_weight(byte((8, 32)), half((2, 8)), byte((2, 8)))
    with pytest.raises(ValueError, match=r"the weight must be \[N, K\] beside x \[M, K\], got \(8, 64\) and \(1, 65\)"):
        quant_matmul(half((1, 65)), weight, backend=Backend())


def test_the_kernel_is_chosen_where_it_helps():
    def groups_of(size: int) -> Int4Weight:
        groups = jnp.ones((2, 8))
        return int4_weight(jnp.zeros((8, size), jnp.uint8), groups, groups.astype(jnp.uint8))

    chosen = functools.partial(implementation_for, dtype=jnp.dtype(jnp.bfloat16))
    triton = Backend(implementation="triton")
    assert [chosen(triton, groups_of(128), rows=rows) for rows in (1, 256, 257)] == ["triton", "triton", "xla"]
    assert chosen(triton, groups_of(48), rows=1) == "xla"
    assert chosen(Backend(), groups_of(128), rows=1) == "xla"
    assert implementation_for(triton, groups_of(128), rows=1, dtype=jnp.dtype(jnp.float32)) == "xla"


@given(
    rows=st.integers(1, 4096), n=st.integers(1, 40000), groups=st.integers(1, 200), device=st.sampled_from(["", "Z1"])
)
def test_every_part_of_a_split_has_groups(rows: int, n: int, groups: int, device: str):
    split = tiles_for(rows=rows, n=n, steps=groups, device_kind=device).split_k
    assert split == 1 or groups // split >= 4


def test_no_configuration_may_unpack_the_weight():
    cases = configurations()
    assert len({case.label for case in cases}) == len(cases) == 77
    chosen = set()
    for case in cases:
        x, weight, _ = case.arguments
        n, k = weight.shape[-2:]
        assert jax.eval_shape(case.function, *case.arguments).shape == (x.shape[0], n), case.label
        # beside x in eight bits
        if "by" not in case.label:
            assert case.max_temporary_bytes is not None and case.max_temporary_bytes <= 0.35 * n * k, case.label
        if isinstance(weight, Int4Weight):
            tiles = tiles_for(rows=x.shape[0], n=n, steps=k // weight.group_size)
            chosen.add((tiles.block_m, tiles.block_n))
    assert chosen == {(16, 64), (32, 64), (64, 64), (64, 128)}


@pytest.mark.parametrize("wrong", [{"lowering": "jax_triton"}, {"lowering": "jax-triton", "interpret": True}])
def test_a_lowering_that_cannot_be_is_refused(wrong: dict):
    with pytest.raises(ValueError, match=r"lowering must be one of \('pallas', 'jax-triton'\), 'pallas' to interpret"):
        Backend(implementation="triton", **wrong)
