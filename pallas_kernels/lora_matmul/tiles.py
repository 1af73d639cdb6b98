"""Tile sizes of the kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.triton_call import cdiv, next_power_of_two

#: programs of a step of few rows, over which the in-features are shared out: a multiprocessor's of a large GPU each
PROGRAMS = 128
#: least in-features of a program, so that what the second kernel has to add up stays small
LEAST_COLUMNS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Shares of the programs of both kernels."""

    #: rows of x
    block_t: int
    #: ranks at once: of all parts in the first kernel, of one in the second
    block_r: int
    #: in-features of a step of the first
    block_k: int
    #: out-features of the second
    block_n: int
    #: parts of the in-features, each with programs of its own
    split_k: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("block_t", "block_r", "block_k", "block_n"):
            size = getattr(self, name)
            # what Triton's tensor-core product takes
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from 16 up, got {size}")


def tiles_for(*, rows: int, columns: int, features: int, rank: int, num_slots: int) -> Tiles:
    """Tiles that leave few programs idle: with few rows the in-features are split, with many they are not.

    Nothing of them has been timed on a GPU.
    """
    fit = lambda block, size: max(16, min(block, next_power_of_two(size)))  # noqa: E731
    block_t, block_r, block_k = fit(64, rows), fit(32, rank), fit(128, columns)
    programs = cdiv(rows, block_t) * num_slots
    split_k = max(1, min(PROGRAMS // programs, columns // LEAST_COLUMNS))
    return Tiles(
        block_t=block_t,
        block_r=block_r,
        block_k=block_k,
        block_n=fit(128, features),
        split_k=1 << (split_k.bit_length() - 1),
    )
