"""The one seam to Pallas' Triton lowering. Only kernels import this: on a CPU nothing of Pallas is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.gpu_only import gpu_only


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    out_shape: Any,
    grid: Sequence[int],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    in_specs: Any = None,
    out_specs: Any = None,
    input_output_aliases: Mapping[int, int] | None = None,
) -> Callable[..., Any]:
    """`pallas_call` through Triton.

    Without compiler parameters JAX 0.10 would take Mosaic. Specs left out pass whole arrays as pointers into device
    memory: nothing is loaded until the kernel does.
    """
    # as long as JAX has this lowering; the range of versions in pyproject.toml ends before it may go
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    specs = {key: value for key, value in (("in_specs", in_specs), ("out_specs", out_specs)) if value is not None}
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=tuple(grid),
        name=name,
        interpret=interpret,
        input_output_aliases=dict(input_output_aliases or {}),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **specs,
    )
    return call if interpret else gpu_only(call, name=name, implementation="triton")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
