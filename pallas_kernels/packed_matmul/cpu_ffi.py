"""The kernels for CPUs (`kernel`), and the calls of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dense_matmul, gguf_blocks
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import Kernels, target_name
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, ScaledWeight

#: what `formats` has; said here, too, since reading it takes llvmlite
GROUPS, SCALE_DTYPES = (32, 64, 128), ("bfloat16", "float16", "float32")
BLOCKS = tuple(gguf_blocks.BLOCKS)
#: no kernel takes fewer columns at once
COLUMNS = 32
#: most rows by which a GGUF file's simpler blocks are multiplied in float32 where XLA has AMX
ROWS_BESIDE_AMX = 128
#: columns that the kernel of groups of sixteen takes
SMALL_GROUPS = 64


def _module(name: str) -> Any:
    from pallas_kernels.packed_matmul.kernel import module

    return module(name)


_SOURCES = [Path(__file__).parent, Path(dense_matmul.__file__).parent, Path(gguf_blocks.__file__)]
KERNELS = Kernels(_module, _SOURCES)


def load(weights: Iterable[Any], dtype: jnp.dtype, folder: Path | None) -> str:
    """Load the kernels of weights, or of their shapes, for x of a dtype (`Kernels.load`); "" where they have none."""
    forms = _forms(weights, kernel_of)
    names = {f"{_inputs(form, dtype)}_{form}" for form in forms}
    names |= {f"wide_{form}" for form in forms if takes_many_rows(form)}
    return KERNELS.load(names, folder) if names else ""


def load_grouped(weights: Iterable[Any], dtype: jnp.dtype, folder: Path | None) -> str:
    """`load` of weights [..., E, N, K] of which each row of x has its own; arrays, too."""
    names = {f"grouped_{_inputs(form, dtype)}_{form}" for form in _forms(weights, grouped_kernel_of)}
    return KERNELS.load(names, folder) if names else ""


def _forms(weights: Iterable[Any], form_of: Callable[[Any], str | None]) -> set[str]:
    """Of weights, and of parts of them on several devices: of eight bits in groups, one group a row."""
    whole, parts = list(weights), []
    for weight in whole:
        if isinstance(weight, ScaledWeight) and weight.zeros is None:
            one: Any = jax.ShapeDtypeStruct((*weight.shape[:-1], 1), weight.scales.dtype)
            parts.append(dataclasses.replace(weight, scales=one))
    return {form for weight in (*whole, *parts) if (form := form_of(weight)) is not None}


def takes_many_rows(form: str, rows: int = 0) -> bool:
    """Whether so many rows have a kernel that are more than those for few take. XLA multiplies them by Intel's AMX, if
    there is, but makes numbers of a GGUF file's blocks first, which takes it longer; of all but K-quants only where
    rows are few enough.
    """
    return not amx.is_usable() or (form in BLOCKS and (rows <= ROWS_BESIDE_AMX or form.endswith("_K")))


def _inputs(form: str, dtype: jnp.dtype) -> str:
    """In which form a kernel takes x of a dtype: the beginning of its name."""
    return "rounded" if rounds(dtype) and not _is_of_floats(form) else "exact"


def _is_of_floats(form: str) -> bool:
    """Whether it is one of `formats.FLOATS`."""
    return form in SCALE_DTYPES or form.startswith(("fp8", "codebook"))


def grouped_kernel_of(weight: Any) -> str | None:
    """`kernel_of` of matrices that rows of x choose from, which may be dense."""
    if isinstance(weight, jax.Array | jax.ShapeDtypeStruct):
        fits = weight.size and weight.dtype.name in SCALE_DTYPES and weight.shape[-1] % COLUMNS == 0
        return weight.dtype.name if fits else None
    return kernel_of(weight)


def kernel_of(weight: Any) -> str | None:
    """The name of the kernel that multiplies by a weight, which may be a tree of shapes; None: there is none."""
    if 0 in weight.shape:  # whose groups have no size
        return None
    if isinstance(weight, ScaledWeight):
        number = {"int8": "int8", "float8_e4m3fn": "fp8"}.get(weight.values.dtype.name)
        if number is None or weight.shape[-1] % COLUMNS:
            return None
        if weight.one_scale_a_row:
            return number
        group, dtype = weight.shape[-1] // weight.scales.shape[-1], weight.scales.dtype.name
        # one group with zeros may be split over devices into parts of any other size, which have it whole
        has_zeros_form = number == "int8" and weight.scales.shape[-1] > 1
        fits = group in GROUPS and dtype in SCALE_DTYPES and (weight.zeros is None or has_zeros_form)
        return f"{number}_{group}_{dtype}{'' if weight.zeros is None else '_zeros'}" if fits else None
    if isinstance(weight, CodebookWeight):
        group, dtype = weight.shape[-1] // weight.scales.shape[-1], weight.scales.dtype.name
        fits = group in GROUPS and dtype in ("float32", "uint8") and weight.factors is None
        # whose factors are the result's
        fits |= (group, dtype) == (16, "float8_e4m3fn") and weight.shape[-1] % SMALL_GROUPS == 0
        return f"codebook_{group}_{dtype}" if fits else None
    if isinstance(weight, Int4Weight):
        dtype = jnp.dtype(weight.scales.dtype).name
        fits = weight.group_size in GROUPS and dtype in SCALE_DTYPES
        return f"int4_{weight.group_size}_{dtype}" if fits else None
    if isinstance(weight, BlockWeight):
        return weight.kind if weight.kind in BLOCKS else None
    return None


def sum_columns(form: str) -> int:
    """Of how many columns of x each a kernel wants the sum, for the weight's minima; 0: it has none."""
    if form.endswith("zeros"):
        return 32
    return {"Q2_K": 16, "Q4_K": 32, "Q5_K": 32, "Q4_1": 32, "Q5_1": 32}.get(form, 0)


def rounds(dtype: jnp.dtype) -> bool:
    """Whether x of a dtype is multiplied in integers of 16 bits, and not in float32."""
    return dtype != jnp.float32


def packed_matmul_cpu(x: jax.Array, weight: Any, layer: jax.Array, *, version: str, many: bool = False) -> jax.Array:
    """`packed_matmul_reference` of a layer of a stack [L, N, K], which is read where it lies. A row of the result has
    the same bits whatever other rows there are.

    Args:
        layer: i32 []; or i32 [M], sorted, of each row its own matrix, -1: none, and the row is zeros.
        many: whether there are so many rows that parts of the weight are better widened for them.
    """
    form, n = grouped_kernel_of(weight), weight.shape[-2]
    assert form is not None
    name = f"{'grouped_' if layer.ndim else ''}{'wide' if many else _inputs(form, x.dtype)}_{form}"
    factors: jax.Array | None = None
    arrays: list[Any] = jax.tree.leaves(weight)
    if isinstance(weight, ScaledWeight) and weight.one_scale_a_row:
        arrays, factors = [weight.values], weight.scales
    elif isinstance(weight, CodebookWeight):
        arrays, factors = [weight.packed, weight.scales, jnp.asarray(weight.table, jnp.float32)], weight.factors
    call = jax.ffi.ffi_call(target_name(name, version), jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32))
    y = call(x.astype(jnp.float32), layer, *arrays)
    if factors is not None and layer.ndim:
        y = y * factors[jnp.maximum(layer, 0), :, 0].astype(jnp.float32)
    elif factors is not None:
        y = y * lax.dynamic_index_in_dim(factors, layer, keepdims=False)[:, 0].astype(jnp.float32)
    return y
