"""Products with dense weights: the kernels for CPUs, and the reference, against the numbers of float64."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import itertools
import mmap
import platform
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import _Compiler, processor
from pallas_kernels.dense_matmul.api import dense_matmul, gated_matmul, has_kernel
from pallas_kernels.dense_matmul.cpu_ffi import ACTIVATIONS, PAIRED, PAIRS, TILES, best_form, load
from pallas_kernels.dense_matmul.cpu_ffi import KERNELS as DENSE_KERNELS

FLOAT32 = jnp.dtype(jnp.float32)
LAYERS, LAYER, NUM_OUT, NUM_IN = 3, 1, 37, 96
#: several and single rows of a tile, with and without widening them before, and more than a block of them
ROWS = (1, 3, 4, 7, 41)
#: kernels as dtype and form; all of them where the processor can
KERNELS = [
    *((dtype, lanes) for dtype in ("float32", "bfloat16") for lanes in ("8", "16")),
    *([("bfloat16", PAIRS)] if "avx512bf16" in processor()[1] else []),
    *([("bfloat16", TILES)] if amx.is_usable() else []),
]


@functools.cache
def backend(dtype: str, form: str | None, activation: str = "") -> Backend:
    return Backend() if form is None else Backend(cpu_dense=(load(dtype, KERNELS_FOLDER, form, activation=activation),))


def operands(dtype: str, count: int = ROWS[-1], n: int = NUM_OUT, num_in: int = NUM_IN) -> tuple[jax.Array, jax.Array]:
    """Rows, and a stack of weights."""
    draw = np.random.default_rng(0)
    x, weight = draw.normal(size=(count, num_in)), draw.normal(size=(LAYERS, n, num_in))
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


@functools.partial(jax.jit, static_argnames=("backend", "dtype"))
def product(x: jax.Array, weights: jax.Array, layer: jax.Array | None, backend: Backend, dtype: Any = FLOAT32):
    return dense_matmul(x, weights, backend=backend, layer=layer, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("backend", "activation", "dtype"))
def gated_product(
    x: jax.Array,
    weights: jax.Array,
    layer: jax.Array | None,
    backend: Backend,
    activation: str,
    dtype: Any = FLOAT32,
):
    return gated_matmul(x, weights, activation=activation, backend=backend, layer=layer, dtype=dtype)


def exact_gated(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    """Elfwing et al. 2017, and the tanh form of Hendrycks and Gimpel 2016."""
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up


@pytest.mark.parametrize(("dtype", "form"), [*KERNELS, ("float32", None), ("bfloat16", None)])
def test_equals_the_formula(dtype: str, form: str | None):
    rows, weights = operands(dtype)
    own = backend(dtype, form)
    assert has_kernel(own, weights) == (form is not None)
    w = np.asarray(weights[LAYER], np.float64)
    for count in ROWS:
        x = rows[:count]
        exact = np.asarray(x, np.float64)
        bound = (NUM_IN + 8) * 2.0**-24 * (np.abs(exact) @ np.abs(w).T)
        for found in (product(x, weights, jnp.int32(LAYER), own), product(x, weights[LAYER], None, own)):
            assert found.shape == (count, NUM_OUT) and found.dtype == jnp.float32
            assert (np.abs(np.asarray(found) - exact @ w.T) <= bound).all(), count


@pytest.mark.parametrize(
    ("dtype", "form", "activation"),
    [
        ("float32", "8", "silu"),
        *((*kernel, "silu") for kernel in KERNELS if kernel[1] in (PAIRS, TILES)),
        ("bfloat16", "16", "gelu"),
        ("bfloat16", None, "silu"),
        ("bfloat16", None, "gelu"),
    ],
)
def test_a_gated_product_equals_the_formula(dtype: str, form: str | None, activation: str):
    rows, weights = operands(dtype, n=2 * NUM_OUT)
    # gates of which none is far behind the activation's bend
    weights = weights / jnp.asarray(NUM_IN**0.5, dtype)
    own = backend(dtype, form, activation)
    assert has_kernel(own, weights, activation=activation) == (form is not None) and not has_kernel(own, weights)
    gate, up = np.split(np.asarray(rows, np.float64) @ np.asarray(weights[LAYER], np.float64).T, 2, axis=1)
    exact = exact_gated(gate, up, activation)
    for count in ROWS:
        x = rows[:count]
        for args in ((x, weights, jnp.int32(LAYER)), (x, weights[LAYER], None)):
            found = gated_product(*args, own, activation)
            assert found.shape == (count, NUM_OUT) and found.dtype == jnp.float32
            np.testing.assert_allclose(found, exact[:count], rtol=1e-5, atol=2e-5)
        if form is not None:  # the same bits beside any others
            last = gated_product(rows[-count:], weights, jnp.int32(LAYER), own, activation)
            whole = gated_product(rows, weights, jnp.int32(LAYER), own, activation)
            np.testing.assert_array_equal(last, whole[-count:])


#: gates from -inf to inf at which powers of e leave float32, and where they do not
GATES = (-np.inf, -3e38, -2e19, -1e4, -200, -100, -60, -3, -0.0, 3, 60, 100, 1e4, 2e19, 3e38, np.inf, np.nan)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "form"), [*KERNELS, ("float32", None)])
def test_gates_of_any_size(dtype: str, form: str | None, activation: str):
    """One row, and rows whose weights are widened first."""
    weight = np.zeros((2 * len(GATES), 32))
    weight[: len(GATES), 0], weight[len(GATES) :, 0] = GATES, 1
    weight = jnp.asarray(weight, dtype)
    gates = np.asarray(weight[: len(GATES), 0], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = exact_gated(gates, np.ones_like(gates), activation)
    for count in (1, 5):
        x = jnp.zeros((count, 32), dtype).at[:, 0].set(1)
        for row in gated_product(x, weight, None, backend(dtype, form, activation), activation):
            np.testing.assert_allclose(row, exact, rtol=2e-5, atol=3e-7)


def test_a_gated_product_is_refused():
    x, weights = operands("float32", 2)
    for activation, given in (("relu", weights[0, :36]), ("silu", weights[0])):
        with pytest.raises(ValueError, match="a gated product is silu or gelu of halves"):
            gated_matmul(x, given, activation=activation, backend=Backend())


def nearest_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Of float32 numbers that are none of too small ones: half of a last place more, or less to the even one."""
    bits = numbers.view(np.uint32)
    rounded = np.where(np.isnan(numbers), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
    return (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("dtype", "form", "activation"),
    [
        *((*kernel, "") for kernel in KERNELS),
        *((*kernel, "silu") for kernel in KERNELS if kernel[1] in ("8", TILES)),
        ("bfloat16", None, ""),
        ("bfloat16", None, "silu"),
    ],
)
def test_results_in_bfloat16_are_the_nearest_to_those_in_float32(dtype: str, form: str | None, activation: str):
    """Of two, the even one; what is no number stays none, and what is too large becomes infinite."""
    rows, weights = operands(dtype, n=2 * NUM_OUT if activation else NUM_OUT)
    draw = np.random.default_rng(1)
    # sums with one bit behind the last one of bfloat16
    integers = jnp.asarray(draw.integers(128, 256, size=(LAYERS, weights.shape[1])), dtype)
    weights = weights.at[:, :, 0].set(integers).at[:, :, 1].set(128)
    rows = rows.at[1].set(jnp.nan).at[3:6].set(0).at[3, 0].set(1).at[3, 1].set(2.0**-8)
    rows = rows.at[4, 0].set(3e36).at[5, 1].set(-2e36)
    own = backend(dtype, form, activation)
    multiply = functools.partial(gated_product, activation=activation) if activation else product
    for count in ROWS:
        wide = np.asarray(multiply(rows[:count], weights, jnp.int32(LAYER), own))
        found = multiply(rows[:count], weights, jnp.int32(LAYER), own, dtype=jnp.dtype(jnp.bfloat16))
        assert found.shape == wide.shape and found.dtype == jnp.bfloat16
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found.astype(jnp.float32), nearest_bfloat16(wide))
    if not activation:
        assert ((nearest_bfloat16(wide)[3] - wide[3]) != 0).any() and np.isinf(np.asarray(found, np.float32)[4]).any()
    assert np.isnan(np.asarray(found, np.float32)[1]).all()


@pytest.mark.parametrize(("dtype", "form"), KERNELS)
def test_a_row_has_the_same_bits_beside_any_others(dtype: str, form: str):
    rows, weights = operands(dtype)
    own = backend(dtype, form)
    whole = np.asarray(product(rows, weights, jnp.int32(LAYER), own))
    for count in ROWS:
        last = product(rows[-count:], weights, jnp.int32(LAYER), own)
        np.testing.assert_array_equal(last, whole[-count:])
    nan_beside = product(rows.at[1].set(jnp.nan), weights, jnp.int32(LAYER), own)
    assert np.isnan(nan_beside[1]).all()
    np.testing.assert_array_equal(np.delete(nan_beside, 1, 0), np.delete(whole, 1, 0))


@pytest.mark.parametrize(
    ("dtype", "form", "activation"), [*((*kernel, "") for kernel in KERNELS), ("bfloat16", "16", "silu")]
)
def test_more_columns_than_are_multiplied_at_once(dtype: str, form: str, activation: str):
    """Three pieces of them, of which the last is shorter: the formula, and the same bits beside any others."""
    from pallas_kernels.dense_matmul.products import PIECE

    num_in = 2 * PIECE + 96
    rows, weights = operands(dtype, n=2 * NUM_OUT if activation else NUM_OUT, num_in=num_in)
    weights = weights / jnp.asarray(num_in**0.5, dtype)
    own = backend(dtype, form, activation)
    exact = np.asarray(rows, np.float64) @ np.asarray(weights[LAYER], np.float64).T
    if activation:
        gate, up = np.split(exact, 2, axis=1)
        exact = exact_gated(gate, up, activation)
    multiply = functools.partial(gated_product, activation=activation) if activation else product
    whole = np.asarray(multiply(rows, weights, jnp.int32(LAYER), own))
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=2e-5)
    for count in (3, 7, 34):
        np.testing.assert_array_equal(multiply(rows[-count:], weights, jnp.int32(LAYER), own), whole[-count:])


@pytest.mark.parametrize("n", [1, 500])
def test_any_number_of_results(n: int):
    """Fewer than a tile has, and more than a thread takes at once."""
    x, weights = operands("bfloat16", 5, n)
    found = product(x, weights, jnp.int32(LAYER), backend("bfloat16", "16"))
    np.testing.assert_allclose(found, product(x, weights, jnp.int32(LAYER), Backend()), rtol=1e-5, atol=1e-4)


def test_other_weights_take_the_reference():
    own = backend("bfloat16", "16")
    shape: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(jnp.bfloat16))
    assert has_kernel(own, shape((3, 4, 64))) and not has_kernel(own, shape((3, 4, 48)))
    assert not has_kernel(own, jax.ShapeDtypeStruct((3, 4, 64), jnp.dtype(jnp.float32)))
    assert not product(jnp.zeros((7, 0), jnp.bfloat16), jnp.zeros((4, 0), jnp.bfloat16), None, own).any()
    assert load("float16", None) == ""
    # of another dtype than x
    x, weights = operands("bfloat16")
    wide = product(x.astype(jnp.float32), weights[0], None, own)
    np.testing.assert_allclose(wide, product(x, weights[0], None, own), rtol=1e-5, atol=1e-4)


def test_a_processor_multiplies_as_it_does_best(monkeypatch: pytest.MonkeyPatch):
    """Pairs of bfloat16 numbers have twice the rate of float32 on AMD's processors, and half of it on Intel's."""
    monkeypatch.setattr(amx, "_is_permitted", lambda: True)
    both = frozenset({"avx2", "avx512f", "avx512bf16"})
    for found, forms in {
        ("znver4", both): ("pairs", "16"),
        ("sapphirerapids", both): ("16", "16"),
        ("sapphirerapids", both | {"amx-bf16"}): ("tiles", "16"),
        # whose virtual machine has no instruction that rounds to bfloat16
        ("sapphirerapids", frozenset({"avx2", "avx512f", "amx-bf16"})): ("16", "16"),
        ("znver3", frozenset({"avx2"})): ("8", "8"),
    }.items():
        for module in ("dense_matmul.cpu_ffi", "cpu_ffi.amx"):
            monkeypatch.setattr(f"pallas_kernels.{module}.processor", lambda found=found: found)
        assert (best_form("bfloat16"), best_form("float32")) == forms


needs_tiles = pytest.mark.skipif(("bfloat16", TILES) not in KERNELS, reason="the processor has no AMX")


@needs_tiles
@pytest.mark.parametrize(
    ("count", "n", "num_in"),
    [
        (16, 32, 32),  # one tile of each
        (17, 1, 32),
        (33, 500, 1376),  # an odd number of tiles, and several items
        (1000, 45, 1056),  # many tiles of rows, the last one half of a pair
        (70, 1100, 1056),  # several parts of the weight in an item
    ],
)
def test_tiles_of_any_sizes(count: int, n: int, num_in: int):
    rows, weights = operands("bfloat16", count, n, num_in)
    exact, w = np.asarray(rows, np.float64), np.asarray(weights[LAYER], np.float64)
    found = product(rows, weights, jnp.int32(LAYER), backend("bfloat16", TILES))
    assert (np.abs(np.asarray(found) - exact @ w.T) <= (num_in + 8) * 2.0**-24 * (np.abs(exact) @ np.abs(w).T)).all()


@needs_tiles
@pytest.mark.parametrize(("activation", "n"), [("", 5), ("", 31), ("", 33), ("silu", 5), ("silu", 33)])
def test_tiles_read_nothing_beyond_the_weight(activation: str, n: int):
    """The last layer's last rows end where memory does; items end within a tile."""
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    count, page = 17, mmap.PAGESIZE
    rows, weights = operands("bfloat16", count, 2 * n if activation else n)
    room = -(-weights.nbytes // page) * page
    memory = np.frombuffer(mmap.mmap(-1, room + page), np.uint8)
    behind, stack = memory.ctypes.data + room, memory[room - weights.nbytes : room]
    stack[:] = np.asarray(weights).view(np.uint8).ravel()  # the kernel asks for no dimensions of it
    x, found, size = np.asarray(rows), np.zeros((count, n), np.float32), np.array([4], np.int32)
    layer = np.array([LAYERS - 1], np.int32)
    name = f"{f'gated_{activation}' if activation else 'dense'}_bfloat16_{TILES}"
    assert protect(behind, page, 0) == 0
    pairs = np.zeros((2, 512, NUM_IN // 32), x.dtype)
    run(PAIRED, [x, pairs], [0, NUM_IN // 32])
    run(name, [pairs, layer, stack, size, found], [0, 4, min(20, n), n])
    own = backend("bfloat16", TILES, activation)
    how = () if not activation else (activation,)
    again = (gated_product if activation else product)(rows, weights, jnp.int32(LAYERS - 1), own, *how)
    np.testing.assert_array_equal(found, again)
    assert protect(behind, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@functools.cache
def compiled(name: str) -> Any:
    """A kernel's machine code in memory."""
    from pallas_kernels.dense_matmul.kernel import module

    compiler = _Compiler(DENSE_KERNELS.sources)
    return compiler.loaded(compiler.compile(module(name)))


def run(name: str, arrays: list[np.ndarray], cuts: list[int]) -> None:
    """A kernel's items, on this thread.

    Args:
        cuts: where each ends and the next begins.
    """
    dims = [np.array(array.shape, np.int64) for array in arrays]
    table = np.array([[array.ctypes.data, own.ctypes.data] for array, own in zip(arrays, dims, strict=True)])
    address = compiled(name).get_function_address("kernel")
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
    for begin, end in itertools.pairwise(cuts):
        kernel(table.ctypes.data, begin, end)


@needs_tiles
def test_launches_with_tiles_run_at_once():
    """Beside each other, and beside products of XLA's, which has tiles of its own on the same threads."""
    rows, weights = operands("bfloat16", 33, 500, 1376)
    calls = [(backend("bfloat16", TILES), jnp.int32(layer)) for layer in range(LAYERS)] + [(Backend(), jnp.int32(0))]
    alone = [np.asarray(product(rows, weights, layer, own)) for own, layer in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda call: product(rows, weights, call[1], call[0]), calls * 8)
        for found, expected in zip(together, alone * 8, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM has the target of x86-64 alone")
@pytest.mark.parametrize("name", [PAIRED, "dense_bfloat16_tiles", "gated_gelu_bfloat16_tiles"])
def test_tiles_are_compiled_on_any_machine(name: str):
    from llvmlite import binding

    from pallas_kernels.dense_matmul.kernel import module

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(cpu="sapphirerapids", reloc="pic")
    made = module(name)
    made.triple, made.data_layout = target.triple, str(target.target_data)
    assembly = target.emit_assembly(binding.parse_assembly(str(made)))
    has_tiles = name != PAIRED
    assert [word in assembly for word in ("ldtilecfg", "tdpbf16ps", "tilerelease")] == [has_tiles] * 3


@needs_tiles
def test_a_process_without_permission_multiplies_without_tiles():
    """Linux refuses it where a thread's stack for signals has no room for tiles."""
    program = """
import ctypes, jax, jax.numpy as jnp
room = ctypes.create_string_buffer(8192)
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
from pallas_kernels.backend import Backend
from pallas_kernels.dense_matmul.api import dense_matmul
from pallas_kernels.dense_matmul.cpu_ffi import best_form, load
assert best_form("bfloat16") == "16" and load("bfloat16", None, "tiles") == ""
backend = Backend(cpu_dense=(load("bfloat16", None),))
ones = jnp.ones((5, 64), "bfloat16")
assert (dense_matmul(ones, ones, backend=backend) == 64).all()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Linux lets this process not use AMX (a thread's alternate stack for signals") == 1
