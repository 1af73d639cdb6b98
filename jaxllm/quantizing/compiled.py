"""Functions that are compiled when they are called, as an engine's programs are: with sums that are right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from jaxllm.runner.compile.compiler_options import RIGHT_SUMS

Given = ParamSpec("Given")
Result = TypeVar("Result")


def compiled(function: Callable[Given, Result], *, static_argnums: int | None = None) -> Callable[Given, Result]:
    """`jax.jit` with what a CPU's compiler has to be told, where that is the device. Not to be called inside of another
    compiled function, which would have to be told.
    """

    @functools.cache
    def made() -> Any:
        options = RIGHT_SUMS if jax.default_backend() == "cpu" else {}
        return jax.jit(function, static_argnums=static_argnums, compiler_options=options)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return made()(*args, **kwargs)

    return call
