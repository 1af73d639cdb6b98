"""Products of inputs that are rounded to int8 with weights of int8: the kernels for CPUs, against numpy's integers."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.quantized_case import stacked
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import _Compiler
from pallas_kernels.quant_matmul.api import implementation_for, quant_matmul
from pallas_kernels.quant_matmul.cpu_ffi import (
    FOURS,
    KERNELS,
    MOST_COLUMNS,
    TILES,
    _codes,
    fits,
    forms,
    kernel_for,
    load,
)
from pallas_kernels.quantized import RoundedInputs, ScaledWeight

LAYERS, LAYER, NUM_OUT, NUM_IN = 3, 1, 37, 192
#: of which this processor can take all
FORMS = forms()
F32 = jnp.dtype(jnp.float32)


def weight_of(n: int, num_in: int, *, scale_dtype: str = "bfloat16", static: bool = False) -> RoundedInputs:
    """Any numbers of int8, and scales of rows; NaN where another layer's are."""
    draw = np.random.default_rng(0)
    values = jnp.asarray(draw.integers(-128, 128, (n, num_in)), jnp.int8)
    scales = jnp.asarray(draw.uniform(0.01, 0.02, (n, 1)), scale_dtype)
    # of parts that were joined, of which the largest counts
    inputs = jnp.asarray([0.01, 0.02], jnp.float32) if static else None
    own = RoundedInputs(weight=ScaledWeight(values=values, scales=scales), scales=inputs, dtype="int8")
    return stacked(own, LAYERS, LAYER)


def inputs_of(count: int, num_in: int) -> jax.Array:
    """Rows of any size, one of which is zeros."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(count, num_in)) * draw.choice([0.01, 1, 30], (count, 1))
    x[1:2] = 0
    return jnp.asarray(x, jnp.bfloat16)


@functools.cache
def backend(form: str, scale_dtype: str = "bfloat16", dtype: str = "bfloat16") -> Backend:
    return Backend(cpu_int8=load([weight_of(1, 64, scale_dtype=scale_dtype)], dtype, KERNELS_FOLDER, form))


@functools.partial(jax.jit, static_argnames=("backend", "dtype"))
def product(
    x: jax.Array, weight: RoundedInputs, layer: jax.Array | None, backend: Backend, dtype: jnp.dtype = F32
) -> jax.Array:
    return quant_matmul(x, weight, backend=backend, layer=layer, out_dtype=dtype)


def rounded(x: jax.Array, static: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers, and float32 scales of rows: 127 for the largest number, or one for all."""
    wide = np.asarray(x, np.float32)
    scales = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
    if static is not None:
        scales = np.full_like(scales, static)
    codes = np.rint(np.clip(wide / np.where(scales == 0, np.float32(1), scales), -127, 127))
    return codes.astype(np.int8), scales


def exact(x: jax.Array, weight: RoundedInputs, layer: int) -> np.ndarray:
    """float32: integers, converted once, times the weight's scale, times x's."""
    own = jax.tree.map(lambda array: array[layer], weight)
    codes, of_x = rounded(x, None if own.scales is None else np.asarray(own.scales).max())
    sums = np.asarray(codes, np.int32) @ np.asarray(own.weight.values, np.int32).T
    return sums.astype(np.float32) * np.asarray(own.weight.scales, np.float32)[:, 0] * np.asarray(of_x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("count", "n", "num_in"),
    [
        (1, NUM_OUT, NUM_IN),
        (15, 1, 64),  # fewer than a tile has
        (17, 500, 21 * 64),  # an odd number of tiles, and several items
        (41, 45, 43 * 64),  # more columns than vectors take at once
        (1000, 33, 320),  # several blocks of rows
    ],
)
def test_equals_numpys_integers(form: str, count: int, n: int, num_in: int):
    x, weight = inputs_of(count, num_in), weight_of(n, num_in)
    found = product(x, weight, jnp.int32(LAYER), backend(form))
    np.testing.assert_array_equal(found, exact(x, weight, LAYER))
    assert found.dtype == jnp.float32 and np.asarray(found)[0].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_scales_of_any_dtype_and_of_all_inputs(form: str, scale_dtype: str):
    """Of a matrix by itself, too, and in the dtypes that results are rounded to."""
    x, weight = inputs_of(5, NUM_IN), weight_of(NUM_OUT, NUM_IN, scale_dtype=scale_dtype, static=True)
    own, want = backend(form, scale_dtype), exact(x, weight, LAYER)
    np.testing.assert_array_equal(product(x, weight, jnp.int32(LAYER), own), want)
    alone = jax.tree.map(lambda array: array[LAYER], weight)
    for dtype in ("bfloat16", "float16", "float32"):
        found = product(x.astype(dtype), alone, None, backend(form, scale_dtype, dtype), jnp.dtype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, jnp.asarray(want).astype(dtype))


@pytest.mark.skipif(not FORMS, reason="the processor has no products of bytes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("static", [False, True])
def test_inputs_are_rounded_bit_for_bit(dtype: str, static: bool):
    """To even numbers in the middle of two, up to the largest; NaN and infinity leave no number beside them. XLA
    divides otherwise, and finds the next number for some that are nearly in the middle.
    """
    weight = weight_of(1, 64, static=static)
    x = np.array(inputs_of(37, 64), np.float32)
    x[0, :6] = [127, 0.5, 1.5, -2.5, -0.5, -126.5]
    x[0, 6:] = 0
    if static:
        x[2, :4] = [2.55, -1000, 0.01, 0.03]
    given = jnp.asarray(x, dtype)
    names = backend(FORMS[0], dtype=dtype).cpu_int8
    by_kernel = jax.jit(functools.partial(_codes, names))
    assert "ffi_call" in str(jax.make_jaxpr(by_kernel)(given, weight, jnp.int32(LAYER)))
    want = rounded(given, 0.02 if static else None)
    for found, expected in zip(by_kernel(given, weight, jnp.int32(LAYER)), want, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    if not static:
        given = given.at[3, 5].set(jnp.nan).at[4, 63].set(jnp.inf)
        found = np.asarray(product(given, weight, jnp.int32(LAYER), backend(FORMS[0], dtype=dtype)))
        assert np.isnan(found[3:5]).all() and np.isfinite(np.delete(found, (3, 4), 0)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_sums_are_exact(form: str):
    """-128 by 127 in each of 2^17 - 64 columns, which 32 bits just hold."""
    values, scales = jnp.full((1, MOST_COLUMNS), -128, jnp.int8), jnp.ones((1, 1), jnp.bfloat16)
    weight = RoundedInputs(weight=ScaledWeight(values=values, scales=scales), dtype="int8")
    found = product(jnp.full((2, MOST_COLUMNS), 127.0), weight, None, backend(form))
    np.testing.assert_array_equal(found, np.full((2, 1), -128 * 127 * MOST_COLUMNS, np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_beside_any_others(form: str):
    rows, weight = inputs_of(41, NUM_IN), weight_of(NUM_OUT, NUM_IN)
    whole = np.asarray(product(rows, weight, jnp.int32(LAYER), backend(form)))
    for count in (1, 2, 7, 16, 33):
        np.testing.assert_array_equal(product(rows[-count:], weight, jnp.int32(LAYER), backend(form)), whole[-count:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, 33])
def test_reads_nothing_beyond_its_operands(form: str, n: int):
    """The weight, its scales and x's each end where memory does, and items within a tile."""
    count, size = 17, mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory: list[np.ndarray] = []

    def at_end(array: np.ndarray) -> np.ndarray:
        room = -(-array.nbytes // size) * size
        whole = np.frombuffer(mmap.mmap(-1, room + size), np.uint8)
        assert protect(whole.ctypes.data + room, size, 0) == 0
        memory.append(whole[room:])
        own = whole[room - array.nbytes : room]
        own[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
        return own.view(array.dtype).reshape(array.shape)

    x, weight = inputs_of(count, NUM_IN), weight_of(n, NUM_IN)
    codes, of_x = rounded(x)
    # as the last layer
    stack, scales = (at_end(np.asarray(array[: LAYER + 1])) for array in jax.tree.leaves(weight))
    given, found = at_end(codes), np.zeros((count, n), np.float32)
    if form == TILES:
        fours = np.zeros((2, 1024, NUM_IN // 64), np.int8)
        run(FOURS, [given, fours], [0, NUM_IN // 64])
        given = fours
    operands = [given, np.array([LAYER], np.int32), stack, scales, at_end(of_x), found]
    run(f"int8_bfloat16_{form}", operands, [0, 4, min(20, n), n])
    np.testing.assert_array_equal(found, exact(x, weight, LAYER))
    for behind in memory:
        assert protect(behind.ctypes.data, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def run(name: str, arrays: list[np.ndarray], cuts: list[int]) -> None:
    """A kernel's items, each of which ends where the next begins, on this thread."""
    dims = [np.array(array.shape, np.int64) for array in arrays]
    table = np.array([[array.ctypes.data, own.ctypes.data] for array, own in zip(arrays, dims, strict=True)])
    address = compiled(name).get_function_address("kernel")
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        kernel(table.ctypes.data, begin, end)


@functools.cache
def compiled(name: str) -> Any:
    """A kernel's machine code in memory."""
    from pallas_kernels.quant_matmul.cpu_kernel import module

    compiler = _Compiler(KERNELS.sources)
    return compiler.loaded(compiler.compile(module(name)))


def test_other_weights_have_no_kernel():
    own = weight_of(NUM_OUT, NUM_IN)
    names = "jaxllm_int8_float32_16_0", "jaxllm_int8_bfloat16_16_0"
    backend = Backend(cpu_int8=names)
    chosen = functools.partial(implementation_for, rows=1, dtype=jnp.dtype(jnp.bfloat16))
    assert kernel_for(names, own) == names[1] and chosen(backend, own) == "cpu_ffi"
    assert chosen(Backend(), own) == "xla" and kernel_for(names[:1], own) is None
    assert chosen(Backend(implementation="reference", cpu_int8=names), own) == "reference"
    inner: Any = own.weight
    grouped = dataclasses.replace(inner, scales=jnp.ones((LAYERS, NUM_OUT, 3), jnp.bfloat16))
    zeros = dataclasses.replace(inner, zeros=jnp.zeros(inner.scales.shape, jnp.int16))
    others = (
        inner,
        dataclasses.replace(own, dtype="float8_e4m3fn"),
        dataclasses.replace(own, group=64),
        *(dataclasses.replace(own, weight=each) for each in (grouped, zeros)),
        *(weight_of(8, columns) for columns in (96, MOST_COLUMNS + 64)),
    )
    assert not any(fits(weight) or chosen(backend, weight) != "xla" for weight in others)
    assert load(others, "bfloat16", None) == ()
    # columns that no kernel takes
    x, odd = inputs_of(3, 96), weight_of(8, 96)
    np.testing.assert_allclose(product(x, odd, jnp.int32(LAYER), backend), exact(x, odd, LAYER), rtol=2e-2, atol=1e-2)


def test_a_processor_multiplies_as_it_does_best(monkeypatch: pytest.MonkeyPatch):
    permitted = True
    monkeypatch.setattr(amx, "_is_permitted", lambda: permitted)
    vnni = {"avx512f", "avx512vnni"}

    def processor_with(known: frozenset[str]) -> None:
        for module in ("quant_matmul.cpu_ffi", "cpu_ffi.amx"):
            monkeypatch.setattr(f"pallas_kernels.{module}.processor", lambda: ("", known))

    for known, found in {
        frozenset({*vnni, "avxvnni", "amx-int8"}): [TILES, "16", "8"],
        frozenset(vnni): ["16"],
        frozenset({"avx2", "avxvnni"}): ["8"],
        frozenset({"avx512f"}): [],
    }.items():
        processor_with(known)
        assert forms() == found
        if not found:
            assert load([weight_of(1, 64)], "bfloat16", None) == ()
    permitted = False
    processor_with(frozenset({"amx-int8", *vnni}))
    assert forms() == ["16"]
    assert load([weight_of(1, 64)], "bfloat16", None, TILES) == ()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM has the target of x86-64 alone")
@pytest.mark.parametrize(
    ("form", "cpu", "words"),
    [
        (TILES, "sapphirerapids", ("ldtilecfg", "tdpbssd", "tilerelease")),
        ("16", "cascadelake", ("vpdpbusd", "zmm")),
        ("16", "znver4", ("vpdpbusd", "zmm")),
        ("8", "alderlake", ("vpdpbusd", "ymm")),
    ],
)
def test_forms_of_other_processors_are_compiled(form: str, cpu: str, words: tuple[str, ...]):
    from llvmlite import binding

    from pallas_kernels.quant_matmul.cpu_kernel import module

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(cpu=cpu, reloc="pic")
    made = module(f"int8_float16_{form}")
    made.triple, made.data_layout = target.triple, str(target.target_data)
    assembly = target.emit_assembly(binding.parse_assembly(str(made)))
    assert all(word in assembly for word in words)
