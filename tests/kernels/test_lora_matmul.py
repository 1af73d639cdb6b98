"""Every implementation of what adapters add to a product against its formula in float64.

A bound of the error: each of the two products sums K or r terms in float32 in any order, each at most eps away from its
sum so far, and what lies between them is rounded once to the type that is multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.lora_matmul.api import configurations, lora_matmul
from pallas_kernels.lora_matmul.cpu_ffi import Form, has_kernel, load
from pallas_kernels.lora_matmul.tiles import Tiles, tiles_for
from pallas_kernels.lora_matmul.triton import lora_matmul_triton

#: (rows, in, parts, rank, slots, dtype of x, dtype of the adapters): one row, one slot, odd ranks, and sizes that tiles
#: do not divide. Few, because each is compiled
SHAPES = (
    (1, 64, (32,), 8, 1, "bfloat16", "bfloat16"),
    (3, 40, (24, 8, 8), 5, 3, "float32", "float32"),
    (40, 72, (40, 20), 7, 4, "bfloat16", "float32"),
    (37, 96, (33,), 16, 2, "float16", "float16"),
    (21, 64, (48,), 1, 5, "float32", "float32"),
    (150, 48, (48, 16), 6, 3, "bfloat16", "float16"),
)
#: layers of a stack, and the one that is meant; the others are NaN
LAYERS, LAYER = 3, 1

#: small ones, so that every loop goes round several times
TILES = Tiles(block_t=16, block_r=16, block_k=16, block_n=16, split_k=2)
BACKENDS = {
    "reference": Backend(implementation="reference"),
    "xla": Backend(implementation="xla"),
    "by slot": Backend(implementation="xla", deterministic=True),
}


@functools.cache
def on_cpu(rank: int, dtype: str) -> Backend:
    """With the kernel for CPUs of adapters of this rank and dtype."""
    backend = Backend(cpu_adapters=load(Form(rank=rank, dtype=dtype), KERNELS_FOLDER))
    assert backend.cpu_adapters
    return backend


def fits(shape: tuple) -> bool:
    """Whether there is a kernel for CPUs."""
    _, columns, parts, rank, num_slots, _, dtype = shape
    a = jax.ShapeDtypeStruct((num_slots, len(parts) * rank, columns), dtype)
    return has_kernel(on_cpu(rank, dtype).cpu_adapters, a, parts)


@functools.cache
def implementation(name: str, shape: tuple, interpret: bool) -> Callable[..., jax.Array]:
    kind, parts = name.removesuffix(" stacked"), shape[2]
    backend = on_cpu(shape[3], shape[6]) if kind == "cpu" else BACKENDS.get(kind)
    backend = backend or Backend(implementation="triton", interpret=interpret)
    product = functools.partial(lora_matmul, backend=backend, parts=parts)
    if kind == "kernel":
        product = functools.partial(lora_matmul_triton, parts=parts, tiles=TILES, interpret=interpret)
    if name == kind:
        return jax.jit(product)

    @jax.jit
    def of_stack(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array) -> jax.Array:
        a, b = (jnp.full((LAYERS, *w.shape), jnp.nan, w.dtype).at[LAYER].set(w) for w in (a, b))
        return product(x, a, b, slots, layer=jnp.int32(LAYER))

    return of_stack


NAMES = ("reference", "xla", "by slot", "xla stacked", "cpu", "cpu stacked", "triton", "kernel", "kernel stacked")


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple, list[int], int, float]:
    """(shape, slot of each row, seed of the contents, magnitude)."""
    shape = draw(st.sampled_from(SHAPES))
    rows, num_slots = shape[0], shape[4]
    slots = st.integers(-1, num_slots - 1)
    kind = draw(st.sampled_from(["any", "one for all", "runs"]))
    if kind == "one for all":
        of_rows = [draw(slots)] * rows
    elif kind == "runs":
        runs = draw(st.lists(st.tuples(slots, st.integers(1, rows)), min_size=1))
        of_rows = [slot for slot, length in runs for _ in range(length)]
        of_rows = (of_rows + [-1] * rows)[:rows]
    else:
        of_rows = draw(st.lists(slots, min_size=rows, max_size=rows))
    return shape, of_rows, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1e-3, 1.0, 30.0]))


def operands(shape: tuple, seed: int, magnitude: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, columns, parts, rank, num_slots, dtype, of_adapters = shape
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.normal(size=(rows, columns)) * magnitude, dtype)
    a = jnp.asarray(draw.normal(size=(num_slots, len(parts) * rank, columns)), of_adapters)
    return x, a, jnp.asarray(draw.normal(size=(num_slots, rank, sum(parts))), of_adapters)


def formula(shape: tuple, x: jax.Array, a: jax.Array, b: jax.Array, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what comes out, the most that it may be off by), float64 [T, out]."""
    rows, columns, parts, rank, *_ = shape
    x64, a64, b64 = (np.asarray(array, np.float64) for array in (x, a, b))
    out, bound = np.zeros((2, rows, sum(parts)))
    eps, between = np.finfo(np.float32).eps, float(jnp.finfo(jnp.promote_types(x.dtype, a.dtype)).eps)
    first = 0
    for number, size in enumerate(parts):
        for row in np.flatnonzero(slots >= 0):
            of_a = a64[slots[row], number * rank : (number + 1) * rank]
            of_b = b64[slots[row], :, first : first + size].T
            low, summed = of_a @ x64[row], np.abs(of_a) @ np.abs(x64[row])
            out[row, first : first + size] = of_b @ low
            off = columns * eps * summed + between * (np.abs(low) + columns * eps * summed)
            bound[row, first : first + size] = np.abs(of_b) @ (off + (rank + 1) * eps * (np.abs(low) + off))
        first += size
    # numbers between the products may underflow in 16 bits
    return out, bound + float(jnp.finfo(x.dtype).tiny) * rank * 8


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(problem=problems())
@example(problem=(SHAPES[0], [0], 0, 1.0))
@example(problem=(SHAPES[0], [-1], 0, 1.0))
@example(problem=(SHAPES[2], [-1] * 40, 0, 1.0))
@example(problem=(SHAPES[2], [3, 2, 1, 0] * 10, 0, 1.0))
def test_equals_the_formula(name: str, interpret: bool, problem: tuple):
    shape, of_rows, seed, magnitude = problem
    assume("cpu" not in name or fits(shape))
    x, a, b = operands(shape, seed, magnitude)
    slots = np.array(of_rows)
    expected, bound = formula(shape, x, a, b, slots)
    # what belongs to nobody is NaN
    x = x.at[slots < 0].set(jnp.nan)
    unused = np.array(sorted({*range(len(a))} - {*of_rows}), int)
    a = a.at[unused].set(jnp.nan)
    if "xla" not in name:
        b = b.at[unused].set(jnp.nan)
    out = np.asarray(implementation(name, shape, interpret)(x, a, b, jnp.asarray(slots, jnp.int32)), np.float64)
    assert out.shape == expected.shape
    np.testing.assert_array_equal(out[slots < 0], 0)
    assert np.all(np.abs(out - expected) <= bound)


@pytest.mark.parametrize("name", ["reference", "xla", "by slot"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=["gathered", "dense"])
def test_gradients_are_the_formula_s(name: str, shape: tuple):
    """Of a loss that is linear in what comes out: those of each slot from its own rows alone."""
    rows, _, parts, rank, num_slots, *_ = shape
    x, a, b = operands(shape, 1)
    slots = np.arange(rows) % (num_slots + 1) - 1
    weights = np.random.default_rng(2).normal(size=(rows, sum(parts)))
    product = implementation(name, shape, True)

    def loss(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(product(x, a, b, jnp.asarray(slots, jnp.int32)) * jnp.asarray(weights, jnp.float32))

    found = jax.grad(loss, argnums=(0, 1, 2))(x, a, b)
    x64, a64, b64 = (np.asarray(array, np.float64) for array in (x, a, b))
    expected = [np.zeros(array.shape) for array in (x, a, b)]
    first = 0
    for number, size in enumerate(parts):
        of_part, ranks = slice(first, first + size), slice(number * rank, (number + 1) * rank)
        for row in np.flatnonzero(slots >= 0):
            slot, w = slots[row], weights[row, of_part]
            back = b64[slot, :, of_part] @ w
            expected[0][row] += a64[slot, ranks].T @ back
            expected[1][slot, ranks] += np.outer(back, x64[row])
            expected[2][slot, :, of_part] += np.outer(a64[slot, ranks] @ x64[row], w)
        first += size
    for gradient, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["by slot", "cpu"])
def test_where_it_is_deterministic_bits_depend_on_neither_rows_nor_slots(name: str):
    shape = (40, 80, (48, 16), 7, 4, "bfloat16", "float32")
    x, a, b = operands(shape, 3)
    slots = np.random.default_rng(4).integers(-1, 4, 40)
    product = implementation(name, shape, True)
    out = np.asarray(product(x, a, b, jnp.asarray(slots, jnp.int32)))
    for rows in (slice(0, 1), slice(5, 7), slice(3, 20)):
        np.testing.assert_array_equal(product(x[rows], a, b, jnp.asarray(slots[rows], jnp.int32)), out[rows])
    # each adapter in another slot
    moved = jnp.asarray(np.where(slots < 0, -1, (slots + 1) % 4), jnp.int32)
    np.testing.assert_array_equal(product(x, jnp.roll(a, 1, axis=0), jnp.roll(b, 1, axis=0), moved), out)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": jnp.zeros((4, 9))}, r"a must be \[S, 2 \* r, in\] and b \[S, r, out\] beside x \[T, in\], got a"),
        ({"a": jnp.zeros((2, 7, 8))}, r"got a \(2, 7, 8\), b \(2, 3, 6\)"),
        ({"b": jnp.zeros((3, 3, 6))}, r"got a \(2, 6, 8\), b \(3, 3, 6\)"),
        ({"parts": (4, 3)}, r"parts must be positive and add up to the 6 out-features of b, got \(4, 3\)"),
        ({"parts": (6, 0)}, "parts must be positive"),
        ({"slots": jnp.zeros(3, jnp.int32)}, r"slots must be int32 \[4\], got int32 \(3,\)"),
        ({"slots": jnp.zeros(4)}, r"slots must be int32 \[4\], got float32"),
        ({"b": jnp.zeros((2, 3, 6), jnp.bfloat16)}, "one of .* got float32, float32 and bfloat16"),
        ({"x": jnp.zeros((4, 8), jnp.int32)}, "one of .* got int32"),
        ({"layer": jnp.int32(0)}, r"a must be \[L, S, 2 \* r, in\]"),
    ],
)
@pytest.mark.parametrize("kind", ["xla", "triton"])
def test_what_does_not_fit_is_refused(kind: str, changed: dict, text: str):
    given = {"x": jnp.zeros((4, 8)), "a": jnp.zeros((2, 6, 8)), "b": jnp.zeros((2, 3, 6)), "parts": (4, 2), **changed}
    given.setdefault("slots", jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=text):
        lora_matmul(**given, backend=Backend(implementation=kind, interpret=True))


def test_configurations_are_distinct_and_trace():
    cases = configurations()
    assert len({case.label for case in cases}) == len(cases) == 24
    for case in cases:
        x, _, b, *_ = case.arguments
        assert jax.eval_shape(case.function, *case.arguments).shape == (x.shape[0], b.shape[3]), case.label


def test_tiles_fit_the_problem():
    """Few rows share out the in-features among programs, many do not; ranks are no wider than they must be."""
    decode = tiles_for(rows=32, columns=4096, features=4096, rank=16, num_slots=4)
    prefill = tiles_for(rows=2048, columns=4096, features=4096, rank=16, num_slots=4)
    assert (decode.block_t, decode.split_k) == (32, 16) and (prefill.block_t, prefill.split_k) == (64, 1)
    assert decode.block_r == 16 and tiles_for(rows=1, columns=40, features=20, rank=5, num_slots=1).block_r == 16
    with pytest.raises(ValueError, match="block_n must be a power of two from 16 up, got 24"):
        Tiles(block_t=16, block_r=16, block_k=16, block_n=24, split_k=1)
