"""What adapters add to a product on a CPU by a kernel (`cpu_kernel`) that reads them where they lie."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cpu_ffi.compiled import Kernels, target_name

#: of adapters
DTYPES = ("float32", "bfloat16", "float16")
#: numbers that are computed at once, of which in-features and the out-features of each part are multiples
LANES = 16
#: matrices that are joined; ranks beyond would take too much room between the products
MOST_PARTS, MOST_RANK = 4, 512
#: what the work is cut along has so many numbers for each row (`work_sharing.UNIT`)
_UNIT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a kernel is written for: a rank, and one of `DTYPES`."""

    rank: int
    dtype: str

    @property
    def name(self) -> str:
        return f"adapters_{self.rank}_{self.dtype}"

    @classmethod
    def named(cls, name: str) -> Form:
        """The form of a kernel's `name`."""
        _, rank, dtype = name.split("_")
        return cls(rank=int(rank), dtype=dtype)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize


def _module(name: str) -> Any:
    from pallas_kernels.lora_matmul.cpu_kernel import module

    return module(name)


KERNELS = Kernels(_module, [Path(__file__).parent])


def load(form: Form, folder: Path | None) -> str:
    """Load a kernel (`Kernels.load`): the name by which programs call it (`Backend.cpu_adapters`); "": none."""
    if form.rank > MOST_RANK or form.dtype not in DTYPES:
        return ""
    version = KERNELS.load([form.name], folder)
    return version and target_name(form.name, version)


def has_kernel(name: str, a: Any, parts: tuple[int, ...]) -> bool:
    """Whether a kernel, by its name for programs, takes adapters, or their shapes: a [..., P * r, in]."""
    form = Form(rank=a.shape[-2] // len(parts), dtype=jnp.dtype(a.dtype).name)
    fits = len(parts) <= MOST_PARTS and not any(size % LANES for size in (a.shape[-1], *parts))
    return bool(name) and fits and name == target_name(form.name, name[-16:])


def lora_matmul_cpu(
    name: str, x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...], layer: jax.Array
) -> jax.Array:
    """`lora_matmul_reference` of a layer of stacks, which are read where they lie. A row of the result has the same
    bits whatever other rows there are, and wherever its adapter lies.
    """
    rows = len(x)
    shared = jax.ShapeDtypeStruct((_UNIT * rows,), jnp.int32)
    call = jax.ffi.ffi_call(name, (shared, jax.ShapeDtypeStruct((rows, b.shape[-1]), jnp.float32)))
    ends = jnp.asarray(tuple(itertools.accumulate(parts)), jnp.int32)
    return call(x.astype(jnp.float32), slots, layer, ends, a, b)[1]
