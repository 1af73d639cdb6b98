"""Tile sizes of the kernel, from `tuned.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """One program's share: ``block_m`` rows of x by ``block_n`` rows of the weight, over one of ``split_k`` parts of
    the steps along K (`walk`)."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            # what Triton's tensor-core product takes
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from 16 up, got {size}")
        if self.split_k < 1:
            raise ValueError(f"split_k must be positive, got {self.split_k}")


@functools.cache
def _tuned() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("tuned.json").read_text())


def most_rows(device_kind: str = "") -> int:
    """The largest M for which the kernel is faster than unpacking the weight for a dense product."""
    return _device(device_kind)["most_rows"]


def tiles_for(*, rows: int, n: int, steps: int, device_kind: str = "") -> Tiles:
    """Tiles for x [rows, K] and a weight [n, K] whose K is walked in ``steps`` steps.

    K is split where the columns alone would leave multiprocessors idle, by n and K only: the order of a row's sum
    depends on the number of rows beside it no more than the choice of the entry in `tuned.json` does. A device that
    `tuned.json` does not name gets its "default".
    """
    device = _device(device_kind)
    entry = next((entry for entry in device["tiles"] if rows <= entry["max_rows"]), device["tiles"][-1])
    block_n = max(16, min(entry["block_n"], 1 << (n - 1).bit_length()))
    return Tiles(
        block_m=entry["block_m"],
        block_n=block_n,
        split_k=_split(steps, _cdiv(entry["least_programs"], _cdiv(n, block_n)), steps // entry["least_steps"]),
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )


def _split(steps: int, wanted: int, most: int) -> int:
    """Into how many parts to cut the steps: from ``wanted`` to twice that, ``most`` at most, the most even ones."""
    first = max(1, min(wanted, most))
    candidates = range(first, max(first, min(2 * wanted, most) if wanted > 1 else first) + 1)
    return min(candidates, key=lambda split: (_cdiv(steps, split) * split, split))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _device(device_kind: str) -> dict[str, Any]:
    tuned = _tuned()
    return tuned.get(device_kind, tuned["default"])
