"""An extra stage: tile sizes of the attention kernels. The fastest belong into ``tuned.json``.

``make gpu-check GPU_CHECK_ARGS="--stages environment sweep"``
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from gpu_check import operations, records
from gpu_check.sizes import sizes
from gpu_check.stages import seconds_left
from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.paged_attention import tiles as tiles_module
from pallas_kernels.paged_attention.tiles import Tiles

#: rows, positions of a piece of context, warps, stages
DECODE = ((16, 32, 64), (32, 64, 128), (2, 4, 8), (2, 3, 4))
PREFILL = ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
#: beside the best of `DECODE`
PROGRAMS_PER_SM = (2, 4, 16)


def main() -> None:
    size = sizes()
    backend = device_backend(jax.devices()[0])
    if records.is_rehearsal():
        backend = Backend(implementation="triton", interpret=True)
    usual = tiles_module.tiles
    tuned = usual(backend.device_kind, head_dim=size.heads[2], itemsize=2)
    sequences, context = size.decode_contexts[0]

    def decode(tiles: Tiles) -> float:
        return _seconds(tiles, lambda: operations.decode_attention_seconds(size, backend, sequences, context))

    def prefill(tiles: Tiles) -> float:
        return _seconds(tiles, lambda: operations.prefill_attention_seconds(size, backend, size.prompts[-1]))

    for name, measure, grid in (("decode", decode, DECODE), ("prefill", prefill, PREFILL)):
        best = _sweep(name, measure, tuned, _candidates(getattr(tuned, name), grid))
        if name == "decode":
            numbers = PROGRAMS_PER_SM[:1] if records.is_rehearsal() else PROGRAMS_PER_SM
            more = [dataclasses.replace(best, programs_per_sm=number) for number in numbers]
            best = _sweep(name, measure, dataclasses.replace(tuned, decode=best), more)
        records.fact(f"best tile, {name}", dataclasses.asdict(best))
    tiles_module.tiles = usual


def _candidates(tuned: Any, grid: tuple[tuple[int, ...], ...]) -> Iterator[Any]:
    rehearsed = 1 if records.is_rehearsal() else None
    for rows, block_n, num_warps, num_stages in itertools.islice(itertools.product(*grid), rehearsed):
        yield dataclasses.replace(tuned, rows=rows, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def _sweep(name: str, measure: Any, tuned: Tiles, candidates: Any) -> Any:
    """The fastest tile, the tuned one included; every one is recorded."""
    share = seconds_left() / (1 if name == "prefill" else 2)
    end = seconds_left() - share
    best, least = getattr(tuned, name), float("inf")
    for candidate in (best, *candidates):
        if seconds_left() < end + 5:
            records.fact("left out: out of time", f"{name} {candidate}")
            break
        shown = " ".join(f"{field}={value}" for field, value in dataclasses.asdict(candidate).items())
        try:
            seconds = measure(dataclasses.replace(tuned, **{name: candidate}))
        except Exception as error:  # tiles that the card has no room for
            records.fact(f"not possible: {name} {shown}", f"{type(error).__name__}: {error}"[:200])
            continue
        records.measurement(f"sweep/{name}", shown, seconds)
        if seconds < least:
            best, least = candidate, seconds
    return best


def _seconds(tiles: Tiles, measure: Any) -> float:
    def chosen(device_kind: str, *, head_dim: int, itemsize: int) -> Tiles:
        return tiles

    tiles_module.tiles = chosen
    return measure()


if __name__ == "__main__":
    main()
