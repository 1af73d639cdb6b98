"""Memory that is given back, as Linux counts it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.runner.memory import freed_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(what: str = "Rss") -> int:
    """Bytes in memory of jaxlib's code and tables."""
    starts = {f"{start:x}" for start, _ in freed_memory.code_mappings()}
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            counts = found.group(1) in starts
        elif counts and line.startswith(f"{what}:"):
            total += 1024 * int(line.split()[1])
    return total


def test_the_compilers_code_leaves_memory_and_comes_back_when_it_runs() -> None:
    def sines(x: jax.Array) -> jax.Array:
        return jnp.sin(x).sum()

    before = jax.jit(sines)(jnp.ones(7))
    held = resident()
    assert resident("Anonymous") == 0, "what the loader wrote would be lost"
    freed_memory.give_back_code()
    given_back = resident()
    assert given_back < held / 4
    # compiles anew
    assert jax.jit(lambda x: sines(x))(jnp.ones(7)) == before
    assert resident() > given_back
