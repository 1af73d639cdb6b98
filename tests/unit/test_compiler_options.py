"""The options that programs for CPUs are compiled with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import THOROUGH

from jaxllm.quantizing.compiled import compiled
from jaxllm.quantizing.inputs import row_errors
from jaxllm.runner.compile.programs import CPU_HEAD_OPTIONS, CPU_OPTIONS


@pytest.mark.parametrize("options", [CPU_OPTIONS, {**CPU_OPTIONS, **CPU_HEAD_OPTIONS}], ids=["layers", "head"])
def test_sums_of_fused_products_are_right(options: dict[str, Any]):
    """jaxlib 0.10.2 gives 1071645696 with its own options (jax issue 39103). All numbers here are exact in float32."""
    n = 2**15 + 1
    numbers = jnp.arange(n, dtype=jnp.float32)
    rows = jnp.stack((numbers, jnp.zeros_like(numbers), jnp.zeros_like(numbers)), axis=1)
    matrix = jnp.eye(3, dtype=jnp.float32)

    def squares(rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    options = {**THOROUGH, **options}
    program = jax.jit(squares).lower(rows).compile(compiler_options=options)
    assert float(program(rows)[-1]) == 2.0**30


def test_sums_of_what_is_quantized_are_right():
    """The same numbers as errors of a matrix's rows."""
    n = 2**15 + 1
    rows = np.zeros((n, 3), np.float32)
    rows[:, 0] = np.arange(n)
    found = compiled(row_errors)(rows, np.eye(3, dtype=np.float32))
    assert float(found[-1]) == 2.0**30
