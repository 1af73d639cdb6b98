"""The kernels for CPUs (`kernel`), and the calls of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import Kernels, processor, target_name

#: whose numbers have kernels
DTYPES = ("bfloat16", "float32")
#: columns come in multiples of it: no kernel takes more at once
COLUMNS = 32
#: the form that multiplies two bfloat16 numbers by one instruction: AMD's have twice the rate of float32, Intel's half
#: of it (Sapphire Rapids: 87 against 173 GFLOP/s of a core)
PAIRS = "pairs"
#: the form that multiplies tiles of bfloat16 numbers by Intel's AMX, and the kernel of x's tiles
TILES, PAIRED = "tiles", "paired_bfloat16"
#: of results
RESULT_DTYPES = ("bfloat16", "float32")
#: activations of gated products (`kernel.ACTIVATIONS`)
ACTIVATIONS = ("silu", "gelu")


def _module(name: str) -> Any:
    from pallas_kernels.dense_matmul.kernel import module

    return module(name)


KERNELS = Kernels(_module, [Path(__file__).parent])


def load(dtype: str, folder: Path | None, form: str | None = None, *, activation: str = "") -> str:
    """Load the kernel of a dtype (`Kernels.load`): the name by which programs call it (`Backend.cpu_dense`); "": none.

    Args:
        form: how it multiplies, the rest of a name in `products.FORMS`, or `TILES`, which there is where the process
            may use AMX; None: as this processor does best.
        activation: one of `ACTIVATIONS`, of a gated product; "": the kernel of products as they are.
    """
    if dtype not in DTYPES:
        return ""
    if form is None:
        form = best_form(dtype)
    if form == TILES and not amx.is_usable():
        return ""
    name = f"{_prefix(activation)}{dtype}_{form}"
    version = KERNELS.load([name, PAIRED] if form == TILES else [name], folder)
    return version and target_name(name, version)


def _prefix(activation: str) -> str:
    """The begin of a kernel's name."""
    return f"gated_{activation}_" if activation else "dense_"


def best_form(dtype: str) -> str:
    """How this processor multiplies numbers of a dtype best, in this process."""
    name, known = processor()
    if dtype == "bfloat16" and "avx512bf16" in known and name.startswith("znver"):
        return PAIRS
    if dtype == "bfloat16" and amx.is_usable():
        return TILES
    return "16" if "avx512f" in known else "8"


def kernel_for(names: tuple[str, ...], weight: Any, activation: str = "") -> str | None:
    """Which of the kernels with these names multiplies rows by a weight [..., N, K], or its shape; or None.

    Args:
        activation: of a gated product (`load`).
    """
    if not names or not weight.size or weight.shape[-1] % COLUMNS:
        return None
    kernel = target_name(f"{_prefix(activation)}{weight.dtype.name}", "")
    return next((name for name in names if name.startswith(kernel)), None)


def dense_matmul_cpu(
    kernel: str,
    x: jax.Array,
    weight: jax.Array,
    layer: jax.Array | None,
    dtype: jnp.dtype,
    *,
    is_gated: bool = False,
) -> jax.Array:
    """`dense_matmul_reference`, or `gated_matmul_reference`, of a layer of a stack [L, N, K], or, where `layer` is
    None, of a weight [N, K].

    Args:
        kernel: of these arrays (`kernel_for`).
        dtype: of the result.
    """
    (rows, num_in), columns = x.shape, weight.shape[-2] // 2 if is_gated else weight.shape[-2]
    made = jnp.dtype(dtype if jnp.dtype(dtype).name in RESULT_DTYPES else jnp.float32)
    if f"_bfloat16_{TILES}_" in kernel:
        tiles = jax.ShapeDtypeStruct((-(-rows // 16), 512, num_in // 32), jnp.bfloat16)
        x = jax.ffi.ffi_call(target_name(PAIRED, kernel.rpartition("_")[2]), tiles)(x)
    elif f"_bfloat16_{PAIRS}_" not in kernel:
        x = x.astype(jnp.float32)
    call = jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct((rows, columns), made))
    return call(x, jnp.int32(0) if layer is None else layer, weight, jnp.int32(made.itemsize)).astype(dtype)
