"""``python -m pallas_kernels.paged_attention.tune [--head-dim N ...] [--json FILE]``

Times tile sizes on the GPU at hand, 16-bit numbers, and prints the best as entries of `tuned.json`. What does not fit
into the multiprocessor is passed over.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.paged_attention.bench import Workload, measure
from pallas_kernels.paged_attention.configurations import Heads
from pallas_kernels.paged_attention.tiles import DecodeTile, PrefillTile, tiles
from pallas_kernels.paged_attention.triton_decode import decode_attention
from pallas_kernels.paged_attention.triton_prefill import prefill_attention

#: a split of a context takes at least so many positions
LEAST_SPLIT = 256
HEADS = {dim: Heads(model=f"{dim}", heads=32, kv_heads=8, head_dim=dim) for dim in (64, 128)} | {
    256: Heads(model="256", heads=16, kv_heads=8, head_dim=256)
}


def decode_tiles(rows: int) -> Iterator[DecodeTile]:
    for block_n, num_warps, num_stages, programs_per_sm in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (4, 16)):
        yield DecodeTile(
            rows=rows,
            block_n=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            least_pieces=LEAST_SPLIT // block_n,
            programs_per_sm=programs_per_sm,
        )


def prefill_tiles() -> Iterator[PrefillTile]:
    for rows, block_n, num_warps, num_stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield PrefillTile(rows=rows, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def best(backend: Backend, workload: Workload, candidates: dict[Any, Any], repeats: int) -> tuple[Any, dict[str, Any]]:
    """The fastest of tile -> attention by it, and its line of results."""
    found: dict[Any, dict[str, Any]] = {}
    for tile, attend in candidates.items():
        try:
            found[tile] = measure(backend, workload, attend=attend, repeats=repeats)
        except jax.errors.JaxRuntimeError as error:
            print(f"{tile}: {str(error).splitlines()[0][:100]}")
            continue
        print(f"{tile}: {found[tile]['us']:.1f} us")
    tile = min(found, key=lambda tile: found[tile]["us"])
    return tile, found[tile]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=sorted(HEADS), default=sorted(HEADS))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each candidate")
    parser.add_argument("--json", type=Path, help="where to write the entries")
    arguments = parser.parse_args()
    backend = device_backend(jax.devices("gpu")[0])
    entries: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": []}
    for dim in arguments.head_dim:
        now = tiles(backend.device_kind, head_dim=dim, itemsize=2)
        decode = {tile: functools.partial(_decode, tile, now.num_sms) for tile in decode_tiles(now.decode.rows)}
        prefill = {tile: functools.partial(_prefill, tile) for tile in prefill_tiles()}
        work = {
            "decode": (Workload(heads=HEADS[dim], seqs=64, computed=4095, queries=1), decode),
            "prefill": (Workload(heads=HEADS[dim], seqs=1, computed=0, queries=8192), prefill),
        }
        for kind, (workload, candidates) in work.items():
            tile, result = best(backend, workload, candidates, arguments.repeats)
            print(result)
            entries[kind].append({"max_head_dim": dim, "itemsize": 2, **vars(tile)})
    print(json.dumps(entries, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(entries, indent=1) + "\n")


def _decode(tile: DecodeTile, num_sms: int, query, cache, layout, batch, **how: Any) -> jax.Array:
    return decode_attention(query, cache, layout, batch, tile, num_sms=num_sms, **how)


def _prefill(tile: PrefillTile, query, cache, layout, batch, **how: Any) -> jax.Array:
    return prefill_attention(query, cache, layout, batch, tile, **how)


if __name__ == "__main__":
    main()
