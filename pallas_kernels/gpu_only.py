"""Kernels where they cannot run: refused when a program is lowered, which is when its platform is known.

A kernel may be traced on a machine without a GPU for a GPU that is elsewhere, so neither the default device nor that of
the operands says what a program is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_gpu_only_p = Primitive("gpu_only")


def gpu_only(call: Callable[..., Any], *, name: str, implementation: str) -> Callable[..., Any]:
    """`call`, a kernel's, with a text of ours where it is lowered for something else than a GPU.

    A program for a GPU stays as it is: the smallest operand passes through an operation of which nothing is left.

    Raises:
        ValueError: by the function that is returned when it runs by itself, by ``jax.jit`` and the like when they
            compile it.
    """

    def checked(*operands: jax.Array) -> Any:
        passed = list(operands)
        smallest = min(range(len(passed)), key=lambda i: passed[i].size)
        passed[smallest] = _gpu_only_p.bind(passed[smallest], kernel=name, implementation=implementation)
        return call(*passed)

    return checked


@_gpu_only_p.def_impl
@functools.partial(jax.jit, static_argnames=("kernel", "implementation"))
def _run(x: jax.Array, *, kernel: str, implementation: str) -> jax.Array:
    return _gpu_only_p.bind(x, kernel=kernel, implementation=implementation)


@_gpu_only_p.def_abstract_eval
def _shape(x: Any, **_: str) -> Any:
    return x


def _lower(ctx: mlir.LoweringRuleContext, x: Any, *, kernel: str, implementation: str) -> list[Any]:
    platforms = ctx.platforms or ctx.module_context.platforms
    if not set(platforms) & {"cuda", "rocm"}:
        raise ValueError(
            f"{kernel}: the kernel of implementation {implementation!r} needs a GPU, and this program is for "
            f"{', '.join(platforms)!r}. Pass Backend(implementation='xla'), or interpret=True for Pallas' interpreter, "
            "which is slow."
        )
    return [x]


mlir.register_lowering(_gpu_only_p, _lower)
batching.defvectorized(_gpu_only_p)
ad.deflinear2(_gpu_only_p, lambda cotangent, *_, **__: [cotangent])
