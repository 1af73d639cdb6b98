"""Every implementation of the grouped matrix product against its formula in float64.

A bound of the error: K products summed in float32 in any order, each at most eps away from its sum so far
(K * eps * sum |x| |w|), and one rounding to the result's type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul import triton
from pallas_kernels.grouped_matmul.api import configurations, grouped_matmul
from pallas_kernels.grouped_matmul.cpu_ffi import has_grouped_kernel
from pallas_kernels.grouped_matmul.tiles import Tiles, max_tiles, tiles_for
from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton
from pallas_kernels.packed_matmul.cpu_ffi import load_grouped

TILES = Tiles(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
#: (rows, K, N, groups, dtype): sizes that tiles divide and that they do not, and fewer rows than groups. Few, because
#: each is compiled
SHAPES = (
    (48, 64, 32, 4, "bfloat16"),
    (70, 72, 40, 9, "bfloat16"),
    (37, 40, 24, 5, "float32"),
    (3, 96, 20, 7, "float16"),
)
#: layers of a stack, and the one that is meant; the others are NaN
LAYERS, LAYER = 3, 1

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.cache
def implementation(name: str, interpret: bool) -> Product:
    if name == "kernel":
        return jax.jit(functools.partial(grouped_matmul_triton, tiles=TILES, interpret=interpret))
    kind, _, stacked = name.partition(" ")
    backend = Backend(implementation=kind, interpret=interpret) if kind != "cpu_ffi" else with_cpu_kernels()
    if not stacked:
        return jax.jit(functools.partial(grouped_matmul, backend=backend))

    @jax.jit
    def of_stack(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        stack = jnp.full((LAYERS, *w.shape), jnp.nan, w.dtype).at[LAYER].set(w)
        return grouped_matmul(x, stack, group_sizes, backend=backend, layer=jnp.int32(LAYER))

    return of_stack


@functools.cache
def with_cpu_kernels() -> Backend:
    weights = [jax.ShapeDtypeStruct((1, 8, 32), dtype) for dtype in ("bfloat16", "float16", "float32")]
    backend = Backend(cpu_grouped=load_grouped(weights, jnp.dtype(jnp.bfloat16), KERNELS_FOLDER))
    assert [has_grouped_kernel(backend, w, 16) for w in weights] == [True] * 3
    assert not has_grouped_kernel(backend, weights[0], 17)
    # of rows of which most go to groups of other devices
    x, sizes = jnp.zeros((40, 32), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    w = jnp.zeros((1, 8, 32), jnp.bfloat16)
    for mean, calls in ((None, False), (16, True), (17, False)):
        traced = jax.make_jaxpr(functools.partial(grouped_matmul, backend=backend, mean_rows=mean))(x, w, sizes)
        assert ("ffi_call" in str(traced)) == calls
    return backend


NAMES = ("reference", "xla", "triton", "kernel", "triton stacked", "xla stacked", "cpu_ffi", "cpu_ffi stacked")


def group_of_rows(group_sizes: np.ndarray, rows: int) -> np.ndarray:
    """The group of each row, -1 beyond the last."""
    return np.concatenate([np.repeat(np.arange(len(group_sizes)), group_sizes), np.full(rows - group_sizes.sum(), -1)])


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, int, int, int, str], list[int], int, float]:
    """(shape, group sizes, seed of the contents, magnitude)."""
    shape = draw(st.sampled_from(SHAPES))
    rows, groups = shape[0], shape[3]
    kind = draw(st.sampled_from(["any", "one group has all", "single rows", "nobody"]))
    if kind == "one group has all":
        owner = draw(st.integers(0, groups - 1))
        sizes = [rows * (group == owner) for group in range(groups)]
    elif kind == "single rows":
        owners = draw(st.sets(st.integers(0, groups - 1), max_size=min(rows, groups)))
        sizes = [int(group in owners) for group in range(groups)]
    elif kind == "nobody":
        sizes = [0] * groups
    else:
        cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
        sizes = np.diff([0, *cuts]).tolist()
    return shape, sizes, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1e-3, 1.0, 30.0]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(problem=problems())
@example(problem=((70, 72, 40, 9, "bfloat16"), [0, 17, 0, 1, 16, 0, 0, 33, 0], 0, 1.0))
@example(problem=((48, 64, 32, 4, "bfloat16"), [1, 1, 1, 1], 0, 1.0))
@example(problem=((48, 64, 32, 4, "bfloat16"), [3, 9, 0, 30], 0, 1.0))
def test_equals_the_formula(name: str, interpret: bool, problem: tuple):
    (rows, k, n, groups, dtype), sizes, seed, magnitude = problem
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.normal(size=(rows, k)) * magnitude, dtype)
    w = jnp.asarray(draw.normal(size=(groups, n, k)), dtype)
    owner = group_of_rows(np.array(sizes), rows)
    nobody = owner < 0

    # what belongs to nobody is NaN: rows beyond the last group, and the weights of groups without rows
    poisoned_x = x.at[nobody].set(jnp.nan)
    unused = (jnp.asarray(sizes) == 0)[:, None, None]
    poisoned_w = jnp.where(unused, jnp.nan, w).astype(dtype)
    out = np.asarray(implementation(name, interpret)(poisoned_x, poisoned_w, jnp.asarray(sizes, jnp.int32)), np.float64)

    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)[owner]
    expected = np.einsum("mk,mnk->mn", x64, w64)
    summed = np.einsum("mk,mnk->mn", np.abs(x64), np.abs(w64))
    kind = jnp.finfo(dtype)
    bound = k * np.finfo(np.float32).eps * summed + float(kind.eps) * np.abs(expected) + float(kind.tiny)
    assert out.shape == (rows, n)
    np.testing.assert_array_equal(out[nobody], 0)
    assert np.all(np.abs(out - expected)[~nobody] <= bound[~nobody])


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_reaches_only_its_own_rows(name: str, interpret: bool):
    rows, k, n, groups, dtype = SHAPES[2]
    sizes = np.array([5, 0, 20, 3, 4])
    w = jnp.ones((groups, n, k), dtype).at[jnp.array([2, 4])].set(jnp.inf)
    out = np.asarray(implementation(name, interpret)(jnp.ones((rows, k), dtype), w, jnp.asarray(sizes, jnp.int32)))
    owner = group_of_rows(sizes, rows)
    np.testing.assert_array_equal(out[np.isin(owner, [2, 4])], np.inf)
    np.testing.assert_array_equal(out[np.isin(owner, [0, 3])], k)
    np.testing.assert_array_equal(out[owner < 0], 0)


def test_programs_write_nothing_but_their_own_rows(interpret: bool, monkeypatch: pytest.MonkeyPatch):
    """A GPU runs them in any order, the interpreter from the first to the last: here it is the other way round."""
    if not interpret:
        pytest.skip("a GPU has an order of its own")
    forwards = triton.pl.program_id
    monkeypatch.setattr(triton.pl, "program_id", lambda axis: triton.pl.num_programs(axis) - 1 - forwards(axis))
    rows, k, n, groups, _ = SHAPES[2]
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(rows, k)), draw.normal(size=(groups, n, k))
    sizes = np.array([5, 0, 20, 3, 4])
    arguments = (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(sizes, jnp.int32))
    out = grouped_matmul_triton(*arguments, tiles=TILES, interpret=True)
    owner = group_of_rows(sizes, rows)
    expected = np.where(owner[:, None] < 0, 0, np.einsum("mk,mnk->mn", x, w[owner]))
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("sizes", [[5, 0, 20, 3, 4], [0, 0, 37, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_gradients_are_the_formulas(name: str, sizes: list[int]):
    rows, k, n, groups, _ = SHAPES[2]
    draw = np.random.default_rng(len(sizes))
    x, w, cotangent = (draw.normal(size=shape) for shape in ((rows, k), (groups, n, k), (rows, n)))
    owner = group_of_rows(np.array(sizes), rows)
    poisoned = jnp.asarray(x, jnp.float32).at[owner < 0].set(jnp.nan)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), backend=Backend(implementation=name))
        return jnp.vdot(y, jnp.asarray(cotangent, jnp.float32), precision="highest")

    of_x, of_w = jax.grad(loss, (0, 1))(poisoned, jnp.asarray(w, jnp.float32))
    cotangent[owner < 0] = 0
    np.testing.assert_allclose(of_x, np.einsum("mn,mnk->mk", cotangent, w[owner]), atol=1e-4)
    expected = np.stack([cotangent[owner == g].T @ x[owner == g] for g in range(groups)])
    np.testing.assert_allclose(of_w, expected, atol=1e-4)


@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=40), block=st.sampled_from([16, 32, 64, 128]))
@example(sizes=[1] * 8, block=16)
def test_the_grid_has_a_tile_for_every_row(sizes: list[int], block: int):
    """And no more than one per group that is not full."""
    rows = max(1, sum(sizes))
    needed = sum(math.ceil(size / block) for size in sizes)
    assert needed <= max_tiles(rows, len(sizes), block) <= rows // block + min(rows, len(sizes))


def test_tiles_fit_the_problem():
    few = tiles_for(rows=8, groups=128, n=1536, k=2048, itemsize=2)
    many = tiles_for(rows=16384, groups=8, n=4096, k=4096, itemsize=2)
    assert few.block_m == 16 and many.block_m == 128
    assert tiles_for(rows=8, groups=128, n=20, k=40, itemsize=2).block_n == 32
    assert tiles_for(rows=16384, groups=8, n=4096, k=4096, itemsize=4).block_k * 2 == many.block_k
    assert tiles_for(rows=8, groups=8, n=64, k=64, itemsize=2, device_kind="NVIDIA Z1").block_m == 16
    with pytest.raises(ValueError, match="block_n must be a power of two from 16 up, got 24"):
        Tiles(block_m=16, block_n=24, block_k=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize(
    ("x", "w", "sizes", "layer", "message"),
    [
        ((4, 8), (2, 3, 9), (2,), False, r"w must be \[E, N, K\] beside x \[M, K\], got w \(2, 3, 9\)"),
        ((4, 8), (2, 3, 8), (2,), True, r"w must be \[L, E, N, K\]"),
        ((4, 8), (2, 3, 8), (3,), False, r"group_sizes must be int32 \[2\], got int32 \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(x: tuple, w: tuple, sizes: tuple, layer: bool, message: str):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(
            jnp.zeros(x),
            jnp.zeros(w),
            jnp.zeros(sizes, jnp.int32),
            backend=Backend(),
            layer=jnp.int32(0) if layer else None,
        )
    with pytest.raises(ValueError, match="x and w must have one dtype"):
        grouped_matmul(
            jnp.zeros((4, 8)), jnp.zeros((2, 3, 8), jnp.bfloat16), jnp.zeros(2, jnp.int32), backend=Backend()
        )


def test_configurations_are_distinct_and_trace():
    cases = configurations()
    assert len({case.label for case in cases}) == len(cases) == 28 + 28
    chosen = set()
    for case in cases:
        (rows, k), (_, groups, n, _) = case.arguments[0].shape, case.arguments[1].shape
        out = jax.eval_shape(case.function, *case.arguments)
        assert out.shape == (rows, n), case.label
        if isinstance(case.arguments[1], jax.ShapeDtypeStruct):
            chosen.add(tiles_for(rows=rows, groups=groups, n=n, k=k, itemsize=2).block_m)
    assert chosen == {16, 32, 64, 128}
