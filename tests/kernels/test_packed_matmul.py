"""Products with packed weights: the kernels for CPUs, and the reference, against the numbers that weights stand for."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import psutil
import pytest
from jax import lax
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.cpu_ffi import amx, call_frame
from pallas_kernels.cpu_ffi.compiled import target_name
from pallas_kernels.gguf_blocks import BLOCKS as GGUF_BLOCKS
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.packed_matmul import cpu_ffi
from pallas_kernels.packed_matmul.api import MOST_ROWS, has_kernel, packed_matmul
from pallas_kernels.packed_matmul.cpu_ffi import (
    BLOCKS,
    GROUPS,
    SCALE_DTYPES,
    kernel_of,
    load,
    load_grouped,
)
from pallas_kernels.quant_matmul.layout import int4_weight
from pallas_kernels.quantized import CodebookWeight, ScaledWeight, dense, index

LAYERS, LAYER = 3, 1
#: kernels, each with its weight's columns
KERNELS = {
    "int8": 352,
    "fp8": 96,
    **{f"int4_{group}_{dtype}": 3 * group for group, dtype in zip(GROUPS, SCALE_DTYPES, strict=True)},
    "fp8_32_bfloat16": 96,
    "fp8_128_float32": 384,
    "int8_64_float16": 192,
    "int8_128_float32_zeros": 384,
    "codebook_64_float32": 192,
    "codebook_32_uint8": 96,
    "codebook_16_float8_e4m3fn": 192,
    **{kind: 3 * max(GGUF_BLOCKS[kind][0], 128) - 32 * (GGUF_BLOCKS[kind][0] == 32) for kind in BLOCKS},
}
#: columns of x of which some share a scale, and which those are: [repeated, one group, neighbours of it]
SPAN, GROUPED = 256, (8, 16, 2)
#: 8, 4, 2 and 1 rows of x are multiplied at once; a weight is widened for blocks of 32
ROWS, NUM_OUT = (1, 2, 4, 7, 15), 37
MANY = (33, 71)


def stack(kernel: str, seed: int = 0, n: int = NUM_OUT) -> Any:
    """A stack of random weights [LAYERS, n, columns] that has this kernel."""
    draw, k = np.random.default_rng(seed), KERNELS[kernel]
    number, _, rest = kernel.partition("_")
    if number in ("int8", "fp8"):
        group, dtype, *zeros = rest.split("_") if rest else (k, "bfloat16")
        values = draw.integers(-128, 128, (LAYERS, n, k)).astype(np.int8)
        if number == "fp8":  # all bits but those of NaN
            values = np.where(values & 127 == 127, 8, values).view(ml_dtypes.float8_e4m3fn)
        shape = LAYERS, n, k // int(group)
        own = jnp.asarray(draw.integers(0, 256, shape), jnp.int16) if zeros else None
        return ScaledWeight(values=jnp.asarray(values), scales=jnp.asarray(draw.normal(size=shape), dtype), zeros=own)
    if number == "codebook":
        group, dtype = rest.split("_", 1)
        packed = jnp.asarray(draw.integers(0, 256, (LAYERS, n, k // 2)), jnp.uint8)
        shape = LAYERS, n, k // int(group)
        scales = draw.integers(110, 130, shape) if dtype == "uint8" else draw.normal(size=shape)
        table, factors = tuple(draw.normal(size=16).astype(np.float32).tolist()), None
        if group == "16":
            # what stands for no number is left out, subnormal ones are not
            bits = draw.integers(0, 127, shape).astype(np.uint8)
            scales = bits.view(ml_dtypes.float8_e4m3fn)
            factors = jnp.asarray(draw.normal(size=(LAYERS, n, 1)), jnp.float32)
        return CodebookWeight(packed=packed, scales=jnp.asarray(scales, dtype), factors=factors, table=table)
    if kernel.startswith("int4"):
        _, group, dtype = kernel.split("_")
        groups = LAYERS, k // int(group), n
        packed = draw.integers(0, 256, (LAYERS, n, k // 2)).astype(np.uint8)
        scales = jnp.asarray(draw.normal(size=groups), dtype)
        return int4_weight(jnp.asarray(packed), scales, jnp.asarray(draw.integers(0, 17, groups), jnp.uint8))
    block, nbytes, _ = GGUF_BLOCKS[kernel]
    data = draw.integers(0, 256, (LAYERS, n, k // block, nbytes)).astype(np.uint8)
    for start in HALVES[kernel]:
        numbers = draw.normal(size=data.shape[:-1]).astype(np.float16)
        data[..., start : start + 2] = numbers[..., None].view(np.uint8)
    if kernel == "MXFP4":  # an exponent of two
        data[..., 0] = draw.integers(110, 130, data.shape[:-1])
    return BlockWeight(data=jnp.asarray(data.reshape(LAYERS, n, -1)), kind=kernel)


#: of x: multiplied as they are, and in 16 bits
DTYPES = ("float32", "bfloat16")
#: where a block has float16 numbers: random bytes could be NaN
HALVES = {
    **{"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)},
    **{"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": ()},
}
#: whose numbers are small differences of larger ones
WITH_MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "int8_128_float32_zeros")
#: whose numbers are no integers: x is never rounded
OF_FLOATS = ("fp8", "codebook")


@functools.cache
def backend() -> Backend:
    weights = [stack(kernel) for kernel in KERNELS]
    versions = {load(weights, jnp.dtype(dtype), KERNELS_FOLDER) for dtype in DTYPES}
    assert len(versions) == 1
    return Backend(cpu_kernels=versions.pop())


def rows_of(count: int, kernel: str, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).normal(size=(count, KERNELS[kernel])), dtype)


@functools.partial(jax.jit, static_argnames="backend")
def product(x: jax.Array, weights: Any, layer: jax.Array, backend: Backend) -> jax.Array:
    return packed_matmul(x, weights, backend=backend, layer=layer)


@pytest.mark.parametrize("implementation", ["reference", "cpu_ffi"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_formula(kernel: str, implementation: str):
    weights, own = stack(kernel), backend() if implementation == "cpu_ffi" else Backend()
    assert kernel_of(weights) == kernel and has_kernel(own, weights) == (implementation == "cpu_ffi")
    w = np.asarray(dense(index(weights, jnp.int32(LAYER)), jnp.dtype(jnp.float32)), np.float64)
    size = np.abs(w) + (np.abs(w).max(axis=1, keepdims=True) if kernel in WITH_MINIMA else 0)
    for count in (*ROWS, *MANY):
        for dtype in DTYPES:
            x = rows_of(count, kernel, dtype)
            exact = np.asarray(x, np.float64)
            found = product(x, weights, jnp.int32(LAYER), backend=own)
            assert found.shape == (count, NUM_OUT) and found.dtype == jnp.float32
            bound = (w.shape[1] + 8) * 2.0**-24 * (np.abs(exact) @ size.T)
            if dtype == "bfloat16" and implementation == "cpu_ffi" and not kernel.startswith(OF_FLOATS):
                padded = np.pad(np.abs(exact), ((0, 0), (0, -exact.shape[1] % SPAN)))
                grouped = padded.reshape(count, -1, *GROUPED)
                largest = np.broadcast_to(grouped.max(axis=(2, 4), keepdims=True), grouped.shape)
                largest = largest.reshape(padded.shape)[:, : exact.shape[1]]
                lost = np.where(np.abs(exact) < largest / 128, largest * 2.0**-16, 0)
                bound += lost @ size.T
            assert (np.abs(np.asarray(found) - exact @ w.T) <= bound).all(), (count, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_has_the_same_bits_beside_any_others(kernel: str, dtype: str):
    weights, x = stack(kernel), rows_of(15, kernel, dtype)
    many = rows_of(71, kernel, dtype)
    of_many = np.asarray(product(many, weights, jnp.int32(LAYER), backend=backend()))
    np.testing.assert_array_equal(of_many[:33], product(many[:33], weights, jnp.int32(LAYER), backend=backend()))
    whole = np.asarray(product(x, weights, jnp.int32(LAYER), backend=backend()))
    for count in ROWS:
        part = product(x[:count], weights, jnp.int32(LAYER), backend=backend())
        np.testing.assert_array_equal(part, whole[:count])
    nan_beside = product(x.at[1].set(jnp.nan), weights, jnp.int32(LAYER), backend=backend())
    assert np.isnan(nan_beside[1]).all()
    np.testing.assert_array_equal(np.delete(nan_beside, 1, 0), np.delete(whole, 1, 0))


def test_weights_of_all_formats_are_asked_for_ahead():
    from pallas_kernels.packed_matmul.kernel import module

    assert [kernel for kernel in KERNELS if '@"llvm.prefetch.p0"(' not in str(module(f"exact_{kernel}"))] == []


@pytest.mark.parametrize("kernel", ["int8", "Q4_1"])
def test_sums_that_xla_does_not_round_keep_their_sign(kernel: str):
    """XLA:CPU adds bfloat16 in float32, and leaves the rounding out where float32 is wanted."""
    weights = stack(kernel)
    large = np.zeros((4, KERNELS[kernel]))
    large[[0, 1, 2, 3], [0, 37, 300, 351]] = 2.0, -2.0, 0.5, -(2.0**30)
    small = large * -(2.0**-17)

    @functools.partial(jax.jit, static_argnames="backend")
    def of_sums(a: jax.Array, b: jax.Array, backend: Backend) -> jax.Array:
        return packed_matmul(a + b, weights, backend=backend, layer=jnp.int32(LAYER))

    operands = jnp.asarray(large, jnp.bfloat16), jnp.asarray(small, jnp.bfloat16)
    found, expected = (np.asarray(of_sums(*operands, backend=each)) for each in (backend(), Backend()))
    np.testing.assert_allclose(found, expected, rtol=2.0**-12)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
@pytest.mark.parametrize("count", [1, MOST_ROWS + 1])
def test_fp8_that_is_no_number_makes_none(bits: int, count: int):
    weights = stack("fp8")
    values = np.asarray(weights.values).view(np.uint8).copy()
    values[LAYER, 3, 40] = bits
    weights = dataclasses.replace(weights, values=jnp.asarray(values.view(ml_dtypes.float8_e4m3fn)))
    found = product(rows_of(count, "fp8"), weights, jnp.int32(LAYER), backend=backend())
    assert (np.isnan(found) == (np.arange(NUM_OUT) == 3)).all()


@pytest.mark.parametrize("n", [1, 3, 500])
def test_any_number_of_results(n: int):
    """Fewer than a tile has, and more than a thread takes at once."""
    weights, x = stack("Q4_0", n=n), rows_of(5, "Q4_0")
    found = product(x, weights, jnp.int32(LAYER), backend=backend())
    np.testing.assert_allclose(found, product(x, weights, jnp.int32(LAYER), backend=Backend()), rtol=1e-4, atol=1e-3)


def test_many_rows_and_other_weights_take_the_reference(monkeypatch: pytest.MonkeyPatch):
    weights = stack("int8")
    assert has_kernel(backend(), weights, rows=MOST_ROWS)
    # whatever the processor has, a process may not be allowed to use it
    for has_amx in (True, False):
        monkeypatch.setattr(amx, "is_usable", lambda has_amx=has_amx: has_amx)
        assert has_kernel(backend(), weights, rows=MOST_ROWS + 1) != has_amx
        # where XLA has Intel's AMX, it takes longer to make numbers of blocks than to multiply by them
        for kernel, rows in (("Q4_K", 1000), ("Q8_0", 128), ("Q8_0", 129)):
            assert has_kernel(backend(), stack(kernel), rows=rows) == (not has_amx or rows != 129)
    assert not has_kernel(Backend(), weights)
    assert kernel_of(jnp.zeros((3, 32))) is None
    assert kernel_of(jax.tree.map(lambda array: array[..., :40], weights)) is None  # no multiple of 32


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_parts_on_several_devices_have_kernels_that_are_loaded(
    monkeypatch: pytest.MonkeyPatch, dtype: str, has_zeros: bool
):
    """Of columns that are split each device has whole groups, or all of a single one's scales."""

    def weight(columns: int, groups: int) -> ScaledWeight:
        values, scales = jnp.zeros((1, 8, columns), dtype), jnp.zeros((1, 8, groups), "float16")
        return ScaledWeight(values=values, scales=scales, zeros=scales.astype("int16") if has_zeros else None)

    loaded: set[str] = set()
    monkeypatch.setattr(cpu_ffi.KERNELS, "load", lambda names, _: loaded.update(names))
    for columns, groups in itertools.product((64, 128, 256, 512), (1, 2, 4)):
        loaded.clear()
        load([weight(columns, groups)], jnp.dtype(jnp.bfloat16), None)
        for devices in (1, 2, 4):
            if groups == 1 or groups % devices == 0:
                part = kernel_of(weight(columns // devices, max(groups // devices, 1)))
                assert part is None or loaded & {f"rounded_{part}", f"exact_{part}"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kernel",
    ["int8", "fp8", "int4_128_float32", "Q4_K", "codebook_32_uint8", "codebook_16_float8_e4m3fn", "fp8_32_bfloat16"],
)
def test_rows_with_matrices_of_their_own_have_the_bits_of_their_products(kernel: str, dtype: str):
    """Of experts, sixteen rows of nineteen are of three, fourteen of them of one: tiles of 8, 4, 2 and 1 rows."""
    weights, x, sizes = stack(kernel), rows_of(19, kernel, dtype), np.array([1, 14, 1])
    grouped = Backend(cpu_grouped=load_grouped([weights], x.dtype, KERNELS_FOLDER))
    stacked = jax.tree.map(lambda array: jnp.stack([jnp.zeros_like(array), array]), weights)
    poisoned = x.at[16:].set(jnp.nan)
    found = grouped_matmul(poisoned, stacked, jnp.asarray(sizes, jnp.int32), backend=grouped, layer=jnp.int32(1))
    for row, expert in enumerate(np.repeat(np.arange(3), sizes)):
        alone = product(x[row : row + 1], weights, jnp.int32(expert), backend=backend())
        np.testing.assert_array_equal(found[row], alone[0].astype(dtype))
    np.testing.assert_array_equal(np.asarray(found[16:], np.float32), 0)


@pytest.mark.parametrize("kernel", ["int8", "int8_64_float16", "fp8_128_float32", "codebook_32_uint8", "Q8_0", "Q4_K"])
def test_products_of_nothing(kernel: str):
    """No rows, no columns of the result, and none to add up, which leaves groups without a size."""
    weights, x = stack(kernel), rows_of(3, kernel)
    empty = jax.tree.map(lambda array: array[..., :0], weights)
    kernels = Backend(cpu_kernels=load([weights], x.dtype, KERNELS_FOLDER))
    for rows, stacked in ((x[:0], weights), (x, jax.tree.map(lambda array: array[:, :0], weights)), (x[:, :0], empty)):
        for own in (kernels, Backend()):
            found = product(rows, stacked, jnp.int32(LAYER), backend=own)
            assert found.shape == (len(rows), stacked.shape[-2]) and not found.any()
    assert load([empty], jnp.dtype(jnp.float32), None) == load_grouped([empty], x.dtype, None) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is asked of Linux")
def test_launches_without_numbers_leave_nothing():
    """XLA leaves them out where nothing but a result comes of them."""
    weights, x = stack("int8"), rows_of(1, "int8")
    name = target_name("exact_int8", load([weights], x.dtype, KERNELS_FOLDER))
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((1, 0), jnp.float32), has_side_effect=True)

    def once(_: jax.Array, number: jax.Array) -> jax.Array:
        call(x, jnp.int32(LAYER), weights.values[:, :0])
        return number + 1

    many = jax.jit(lambda: lax.fori_loop(0, 300_000, once, 0)).lower().compile()
    assert name in (many.as_text() or "")
    before = psutil.Process().memory_info().rss
    assert many() == 300_000
    assert psutil.Process().memory_info().rss - before < 16 * 2**20


def test_launches_at_once_do_not_meet():
    """From several threads, and several in one program."""
    kernels = ("int8", "Q4_1")
    weights = {kernel: stack(kernel, n=256) for kernel in kernels}

    @jax.jit
    def both(xs: list[jax.Array], weights: dict[str, Any]) -> list[jax.Array]:
        return [packed_matmul(x, weights[k], backend=backend(), layer=jnp.int32(1)) for x, k in zip(xs, kernels)]  # noqa: B905

    xs = [rows_of(3, kernel) for kernel in kernels]
    expected = both(xs, weights)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: [both(xs, weights) for _ in range(25)], range(8)):
            for each in found:
                jax.tree.map(np.testing.assert_array_equal, each, expected)


def test_frames_of_other_versions_are_not_read():
    assert call_frame.why_not((120, 200, 0, 3)) is None
    assert "version 1.0" in (call_frame.why_not((120, 200, 1, 0)) or "")
    assert "80 and 200 bytes" in (call_frame.why_not((80, 200, 0, 3)) or "")


KEPT = """
    import logging, sys, pathlib
    logging.basicConfig(level=logging.INFO)
    import jax.numpy as jnp
    from pallas_kernels.packed_matmul.cpu_ffi import KERNELS, load
    from pallas_kernels.quantized import ScaledWeight
    assert not sys.modules.get("llvmlite")
    weight = ScaledWeight(values=jnp.zeros((1, 4, 32), jnp.int8), scales=jnp.ones((1, 4, 1)))
    version = load([weight], jnp.dtype(jnp.float32), pathlib.Path(sys.argv[1]))
    print(repr(version), KERNELS.why_not(), "pallas_kernels.packed_matmul.kernel" in sys.modules)
"""


def run(code: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    program = before + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )


def test_machine_code_is_kept(tmp_path: Path):
    """The second process compiles nothing; what is damaged is compiled again."""
    first, second = run(KEPT, str(tmp_path)), run(KEPT, str(tmp_path))
    assert "Compiling the kernel for exact_int8" in first.stderr and first.stdout.split()[1:] == ["None", "True"]
    assert "Compiling" not in second.stderr and second.stdout.split()[1:] == ["None", "False"]
    assert first.stdout.split()[0] == second.stdout.split()[0]
    (kept,) = tmp_path.glob("exact_*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "Compiling the kernel for exact_int8" in run(KEPT, str(tmp_path)).stderr


def test_without_llvmlite_there_are_no_kernels(tmp_path: Path):
    found = run(KEPT, str(tmp_path), before="import sys; sys.modules['llvmlite'] = None\n")
    assert (
        found.stdout.startswith("'' llvmlite cannot be imported")
        and "XLA computes what there are kernels for" in found.stderr
    )
