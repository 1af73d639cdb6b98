"""The kernels of products of int8 numbers for CPUs (`cpu_kernel`), and the calls of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dense_matmul
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import Kernels, processor, target_name
from pallas_kernels.quantized import RoundedInputs, ScaledWeight

#: of a weight's scales
SCALE_DTYPES = ("bfloat16", "float16", "float32")
#: columns come in multiples of it: a row of a tile, or a vector
COLUMNS = 64
#: most of them: sums of their products have room in 32 bits
MOST_COLUMNS = 2**17 - COLUMNS
#: the form that multiplies tiles by Intel's AMX, and the kernel of x's tiles
TILES, FOURS = "tiles", "fours_int8"
#: the kernels that round x, by its dtype
CODES = "codes"
#: the forms of vectors of so many integers of 32 bits, by the feature of a processor that adds four products of bytes
VECTORS = {"avx512vnni": "16", "avxvnni": "8"}


def _module(name: str) -> Any:
    from pallas_kernels.quant_matmul.cpu_kernel import module

    return module(name)


KERNELS = Kernels(_module, [Path(__file__).parent, Path(dense_matmul.__file__).parent])


def load(weights: Iterable[Any], dtype: str, folder: Path | None, form: str | None = None) -> tuple[str, ...]:
    """Load the kernels of weights, or of their shapes (`Kernels.load`): the names by which programs call them
    (`Backend.cpu_int8`); none where these weights, or this processor, have none.

    Args:
        dtype: of x, one of `SCALE_DTYPES`; x of another one is rounded by XLA.
        form: how it multiplies, one of `forms`; None: the best of them.
    """
    dtypes = {weight.weight.scales.dtype.name for weight in weights if fits(weight)}
    found = forms()
    if not dtypes or not found or (form is not None and form not in found):
        return ()
    form = form or found[0]
    names = [*(f"int8_{each}_{form}" for each in sorted(dtypes)), f"{CODES}_{dtype}"]
    version = KERNELS.load([*names, FOURS] if form == TILES else names, folder)
    return tuple(target_name(name, version) for name in names) if version else ()


def forms() -> list[str]:
    """In which forms this process can multiply int8 numbers on this processor, the best first."""
    _, known = processor()
    vectors = [form for feature, form in VECTORS.items() if feature in known]
    return [TILES, *vectors] if amx.is_usable("int8") else vectors


def fits(weight: Any) -> bool:
    """Whether kernels know a weight [..., N, K], or a tree of its shapes: int8 numbers with a scale a row, by inputs
    that are rounded to int8 numbers with a scale each.
    """
    if not isinstance(weight, RoundedInputs) or weight.dtype != "int8" or not isinstance(weight.weight, ScaledWeight):
        return False
    own, columns = weight.weight, weight.shape[-1]
    is_scaled = own.values.dtype == jnp.int8 and own.one_scale_a_row and own.scales.dtype.name in SCALE_DTYPES
    return is_scaled and weight.group in (0, columns) and columns % COLUMNS == 0 and 0 < columns <= MOST_COLUMNS


def kernel_for(names: tuple[str, ...], weight: Any) -> str | None:
    """Which of the kernels with these names multiplies by a weight, or a tree of its shapes; or None."""
    if not names or not fits(weight):
        return None
    kernel = target_name(f"int8_{weight.weight.scales.dtype.name}", "")
    return next((name for name in names if name.startswith(kernel)), None)


def quant_matmul_cpu(names: tuple[str, ...], x: jax.Array, weight: RoundedInputs, layer: jax.Array | None) -> jax.Array:
    """`quant_matmul_reference` in float32, of a layer of a stack [L, N, K], or, where `layer` is None, of a weight
    [N, K]. Sums are exact: a row of the result has the same bits whatever other rows there are.

    Args:
        names: of kernels, one of which is of this weight (`kernel_for`).
    """
    kernel = kernel_for(names, weight)
    assert kernel is not None
    rows, num_in = x.shape
    codes, scales = _codes(names, x, weight, layer)
    if f"_{TILES}_" in kernel:
        fours = jax.ShapeDtypeStruct((-(-rows // 16), 1024, num_in // COLUMNS), jnp.int8)
        codes = jax.ffi.ffi_call(target_name(FOURS, kernel.rpartition("_")[2]), fours)(codes)
    own: Any = weight.weight
    result = jax.ShapeDtypeStruct((rows, weight.shape[-2]), jnp.float32)
    place = jnp.int32(0) if layer is None else layer
    return jax.ffi.ffi_call(kernel, result)(codes, place, own.values, own.scales, scales)


def _codes(
    names: tuple[str, ...], x: jax.Array, weight: RoundedInputs, layer: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`RoundedInputs.codes`, by a kernel where there is one: XLA computes what x comes from twice, for the largest
    number and for what is rounded, and rounds number by number.
    """
    own = target_name(f"{CODES}_{x.dtype.name}", "")
    name = next((name for name in names if name.startswith(own)), None)
    if name is None:
        return weight.codes(x, layer=layer)
    scales = weight.scales if weight.scales is None or layer is None else weight.scales[layer]
    fixed = jnp.float32(-1) if scales is None else jnp.max(scales)
    results = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32), jax.ShapeDtypeStruct(x.shape, jnp.int8)
    found, codes = jax.ffi.ffi_call(name, results)(x, fixed)
    return codes, found[:, None]
