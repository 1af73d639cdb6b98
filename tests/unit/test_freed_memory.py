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


@pytest.mark.parametrize("is_there", [False, True])
def test_tables_stay_where_nobody_says_which_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """What the loader wrote would be lost. Some kernels do not count pages, and QEMU, of another processor's programs,
    only those of no file.
    """
    smaps, of_file, said = tmp_path / "smaps", False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_file = "/" in line
        said += (re.sub(r"\d+ kB$", "0 kB", line) if of_file else line) + "\n"
    if is_there:
        smaps.write_text(said)
    monkeypatch.setattr(freed_memory, "_SMAPS", smaps)
    monkeypatch.setattr(freed_memory, "_unwritten", {})
    maps = Path("/proc/self/maps").read_text()
    code = {int(start, 16) for start in re.findall(r"(?m)^([0-9a-f]+)-[0-9a-f]+ r-xp", maps)}
    found = {start for start, _ in freed_memory.code_mappings()}
    assert found and found <= code
