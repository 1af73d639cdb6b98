"""The benchmarks run, and count what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.kv_write import bench as kv_write_bench
from pallas_kernels.paged_attention import tune
from pallas_kernels.paged_attention.bench import Workload, cpu_workloads, measure, workloads
from pallas_kernels.paged_attention.configurations import Heads
from pallas_kernels.paged_attention.tiles import PrefillTile

SMALL = Workload(
    heads=Heads(model="small", heads=4, kv_heads=2, head_dim=16),
    seqs=2,
    computed=10,
    queries=20,
    query="float32",
    stored="float32",
)
TRITON = Backend(implementation="triton", interpret=True)


def test_a_window_is_all_that_is_counted():
    seen = [[k for k in range(10 + i + 1) if k > 10 + i - 7] for i in range(20)]
    windowed = dataclasses.replace(SMALL, window=7)
    assert windowed.pairs == 2 * sum(map(len, seen))
    assert windowed.read_bytes == 2 * len({k for keys in seen for k in keys}) * 2 * 2 * 16 * 4
    assert SMALL.pairs == 2 * sum(range(11, 31))
    assert SMALL.read_bytes == 2 * 30 * 2 * 2 * 16 * 4


def test_mixed_lengths_have_the_same_mean():
    mixed = dataclasses.replace(SMALL, seqs=11, mixed=True, queries=1)
    assert sorted(mixed.before) == list(range(0, 21, 2))
    assert (mixed.pairs, mixed.width) == (11 * (10 + 1), 2)
    assert mixed.read_bytes == dataclasses.replace(mixed, mixed=False).read_bytes
    batch = mixed.batch(TRITON)
    assert list(batch.positions) == list(mixed.before) and list(batch.kv_lens) == list(mixed.before + 1)


def test_every_operation_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_write_bench, "ROUNDS", 1)
    result = measure(TRITON, dataclasses.replace(SMALL, queries=1), page_bytes=0, repeats=1)
    assert result["us"] > 0 and np.isfinite(result["GB/s"]) and np.isfinite(result["TFLOP/s"])
    result = kv_write_bench.measure(TRITON, dataclasses.replace(SMALL, queries=3), layers=1, repeats=1)
    assert result["us"] > 0


def test_workloads_have_names_of_their_own():
    names = [str(each) for each in (*workloads(), *cpu_workloads())]
    assert len(names) == len(set(names))


def test_the_tuner_takes_the_fastest(monkeypatch: pytest.MonkeyPatch):
    tiles = [PrefillTile(rows=16 * n, block_n=16, num_warps=4, num_stages=2) for n in (1, 2, 3)]
    times = {tile: {"us": us} for tile, us in zip(tiles, (3.0, 1.0, 2.0), strict=True)}
    monkeypatch.setattr(tune, "measure", lambda backend, workload, *, attend, repeats: times[attend])
    assert tune.best(TRITON, SMALL, {tile: tile for tile in tiles}, 1) == (tiles[1], {"us": 1.0})
