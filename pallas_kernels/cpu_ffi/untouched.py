"""Zeros that nobody writes: large arrays on a CPU whose memory the process takes when it is written first."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pallas_kernels.cpu_ffi.compiled import Kernels, target_name

if TYPE_CHECKING:
    from llvmlite import ir

#: memory of arrays from so many bytes on comes from the kernel, page by page and zeroed: on Linux, malloc (glibc's,
#: musl's) keeps none of 32 MiB or more for later
LEAST_BYTES = 64 * 2**20
_NAME = "untouched"


def _module(name: str) -> ir.Module:
    """A function `kernel` that does nothing to its result."""
    from llvmlite import ir

    from pallas_kernels.cpu_ffi.vectors import LONG, POINTER, Code

    made = ir.Module(name=name)
    Code(made, "kernel", [POINTER, LONG, LONG], public=True).end()
    return made


KERNELS = Kernels(_module, [])


def load(folder: Path | None) -> str:
    """Load the kernel (`Kernels.load`): the name by which programs call it (`Backend.cpu_untouched`); "": none."""
    if sys.platform != "linux":
        return ""
    version = KERNELS.load([_NAME], folder)
    return version and target_name(_NAME, version)


def is_large(shape: jax.ShapeDtypeStruct) -> bool:
    """Whether an array's memory is zeroed by the kernel."""
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize >= LEAST_BYTES


def untouched(name: str, shape: jax.ShapeDtypeStruct) -> Any:
    """A large array of zeros, as the result of a program, by the kernel's name for programs."""
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape.shape, shape.dtype))()
