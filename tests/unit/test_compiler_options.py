"""The options that programs for CPUs are compiled with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.quick_compile import THOROUGH

from jaxllm.quantizing.compiled import compiled
from jaxllm.runner.compile.compiler_options import CPU_HEAD_OPTIONS, CPU_OPTIONS

N = 2**15 + 1


def squares(rows: jax.Array) -> jax.Array:
    matrix = jnp.eye(3, dtype=jnp.float32)
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


@pytest.fixture(scope="module")
def rows() -> jax.Array:
    """jaxlib 0.10.2 gives 1071645696 for the last one's squares with its own options (jax issue 39103)."""
    numbers = jnp.arange(N, dtype=jnp.float32)
    return jnp.stack((numbers, jnp.zeros_like(numbers), jnp.zeros_like(numbers)), axis=1)


@pytest.mark.parametrize("options", [CPU_OPTIONS, {**CPU_OPTIONS, **CPU_HEAD_OPTIONS}], ids=["layers", "head"])
def test_sums_of_fused_products_are_right(rows: jax.Array, options: dict[str, Any]):
    program = jax.jit(squares).lower(rows).compile(compiler_options=dict[str, Any](THOROUGH | options))
    assert float(program(rows)[-1]) == 2.0**30


def test_so_are_those_of_what_is_quantized(rows: jax.Array):
    assert float(compiled(squares)(rows)[-1]) == 2.0**30
