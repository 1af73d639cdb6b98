"""Tile sizes of the grouped kernel, from `tuned.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """One program's share: ``block_m`` rows of one group by ``block_n`` columns, ``block_k`` of K at a time."""

    block_m: int
    block_n: int
    #: in elements of two bytes; `tiles_for` halves it for float32
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            # what Triton's tensor-core product takes
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from 16 up, got {size}")


@functools.cache
def _tuned() -> dict[str, list[dict[str, int]]]:
    return json.loads(Path(__file__).with_name("tuned.json").read_text())


def max_tiles(rows: int, groups: int, block_m: int) -> int:
    """Most tiles of ``block_m`` rows that ``rows`` rows in ``groups`` groups can need: a group has at most one tile
    that is not full."""
    return (rows + min(rows, groups) * (block_m - 1)) // block_m


def tiles_for(*, rows: int, groups: int, n: int, k: int, itemsize: int, device_kind: str = "") -> Tiles:
    """Tiles by the mean number of rows in a group, which is all that is known before a program runs.

    A device that `tuned.json` does not name gets its "default". The sizes never exceed the problem's own.
    """
    tuned = _tuned()
    mean = -(-rows // groups)
    entries = tuned.get(device_kind, tuned["default"])
    entry = next((entry for entry in entries if mean <= entry["max_mean_rows"]), entries[-1])
    fit = lambda block, size: max(16, min(block, 1 << (size - 1).bit_length()))  # noqa: E731
    return Tiles(
        block_m=entry["block_m"],
        block_n=fit(entry["block_n"], n),
        block_k=fit(entry["block_k"] * 2 // max(itemsize, 2), k),
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )
