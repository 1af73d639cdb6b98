"""Tile sizes of the kernels, which are data: `tuned.json`, by the device's name and the numbers' sizes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTile:
    """Of the decode kernel."""

    #: query heads of one program, at most
    rows: int
    #: positions of one piece of context
    block_n: int
    num_warps: int
    num_stages: int
    #: a split takes at least so many pieces
    least_pieces: int
    #: programs to have for each multiprocessor: more than run at once, so that lengths even out
    programs_per_sm: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillTile:
    """Of the prefill kernel."""

    #: query tokens times query heads
    rows: int
    #: positions of one piece of context
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    decode: DecodeTile
    prefill: PrefillTile
    #: multiprocessors of the device
    num_sms: int


#: splits of the longest contexts are no longer, in positions, even if all sequences together fill the device: one of
#: them may be much longer than the others
LONGEST_SPLIT = 32768


def decode_splits(tile: DecodeTile, programs: int, context: int, num_sms: int) -> int:
    """Parts that every context is cut into: a power of two.

    Args:
        programs: sequences times KV heads (times blocks of query heads).
        context: positions that the block table has room for.
    """
    wanted = max(tile.programs_per_sm * num_sms // programs, -(-context // LONGEST_SPLIT), 1)
    possible = max(context // (tile.block_n * tile.least_pieces), 1)
    return 1 << (min(wanted, possible).bit_length() - 1)


def tiles(device_kind: str, *, head_dim: int, itemsize: int, operation: str = "paged_attention") -> Tiles:
    """What is tuned for a device, or the default.

    Args:
        device_kind: JAX's name of the device; entries match by their beginning, in whole words.
        itemsize: bytes of a number that is multiplied.
        operation: in whose folder they are.
    """
    table = _tuned(operation)
    words = device_kind.replace("-", " ") + " "
    names = [name for name in table if words.startswith(f"{name} ")]
    device = table[max(names, key=len, default="default")]
    decode = _match(device["decode"], head_dim, itemsize)
    prefill = _match(device["prefill"], head_dim, itemsize)
    return Tiles(decode=DecodeTile(**decode), prefill=PrefillTile(**prefill), num_sms=device["num_sms"])


def _match(entries: list[dict[str, Any]], head_dim: int, itemsize: int) -> dict[str, Any]:
    """The first entry that is for such numbers: of up to `max_head_dim`, and `itemsize` bytes."""
    for entry in entries:
        if head_dim <= entry["max_head_dim"] and itemsize == entry["itemsize"]:
            return {name: value for name, value in entry.items() if name not in ("max_head_dim", "itemsize")}
    largest = max(entry["max_head_dim"] for entry in entries)
    raise ValueError(f"no tile for head_dim {head_dim} of {itemsize} bytes a number; there are some up to {largest}")


@functools.cache
def _tuned(operation: str) -> dict[str, Any]:
    return json.loads(importlib.resources.files(f"pallas_kernels.{operation}").joinpath("tuned.json").read_text())
