"""Large zeros on a CPU that take memory as they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu_ffi.untouched import LEAST_BYTES, is_large, load, untouched

SHAPE = jax.ShapeDtypeStruct((4, 128, 2**20), jnp.uint16)


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_memory_is_taken_as_it_is_written():
    name, size = load(None), 2 * 4 * 128 * 2**20
    assert bool(name) == (sys.platform == "linux") and is_large(SHAPE)
    if not name:
        return
    make = jax.jit(lambda: untouched(name, SHAPE)).lower().compile()
    write = jax.jit(lambda x, i: x.at[i, :1].set(1), donate_argnums=0).lower(SHAPE, jnp.int32(0)).compile()
    before = resident_bytes()
    array = jax.block_until_ready(make())
    assert resident_bytes() - before < size / 16
    array = jax.block_until_ready(write(array, jnp.int32(2)))
    assert resident_bytes() - before < size / 16, "donated, it is written in place"
    seen = np.asarray(array)
    assert (seen[2, 0] == 1).all() and not seen[2, 1:].any() and not seen[:2].any() and not seen[3].any()


def test_small_arrays_may_lie_where_others_have_been():
    assert not is_large(jax.ShapeDtypeStruct((LEAST_BYTES - 1,), jnp.uint8))
