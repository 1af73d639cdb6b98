"""Room in compiled programs: enough for every limit, of few sizes, and little more than is asked for."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import SMALL, write_tiny_model

from jaxllm.config.engine_args import EngineArgs
from jaxllm.runner import device_state
from jaxllm.runner.build import make_programs
from jaxllm.runner.capacities import array_capacity, block_capacity, context_capacity, row_capacity
from jaxllm.runner.compile.target import target_here
from jaxllm.runner.device_state import array_blocks
from jaxllm.runner.memory import plan
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.startup.setup import read_setup

PLATFORMS = st.sampled_from(["cpu", "cuda"])


@given(st.integers(1, 5000), PLATFORMS)
def test_rows(max_num_seqs: int, platform: str):
    rows = row_capacity(max_num_seqs, platform)
    assert rows >= max_num_seqs
    assert row_capacity(rows, platform) == rows
    assert rows <= (64 if platform == "cpu" else 16) or rows < 2 * max_num_seqs or rows == 256


@given(st.integers(1, 2**20), st.integers(1, 2**20), PLATFORMS)
def test_contexts(max_model_len: int, longest: int, platform: str):
    max_model_len = min(max_model_len, longest)
    tokens = context_capacity(max_model_len, longest, platform)
    assert tokens >= max_model_len and (tokens.bit_count() == 1 or tokens % 8192 == 0)
    assert tokens < 2 * max(max_model_len, min(longest, 8192) if platform == "cpu" else 1)


@given(st.integers(1, 10**6), st.integers(1, 2**26), PLATFORMS)
def test_blocks(useful: int, block_bytes: int, platform: str):
    blocks = block_capacity(useful, block_bytes, platform)
    assert blocks >= useful and block_capacity(blocks, block_bytes, platform) == blocks
    assert blocks <= max(useful, 2**27 / block_bytes) * 9 / 8
    assert platform == "cpu" or blocks <= useful * 9 / 8


@given(st.integers(1, 10**6), st.integers(1, 2**26), st.integers(2**20, 2**40))
def test_blocks_of_arrays(num_blocks: int, block_bytes: int, machine_bytes: int):
    blocks = array_capacity(num_blocks, block_bytes, machine_bytes)
    assert blocks >= num_blocks and array_capacity(blocks, block_bytes, machine_bytes) == blocks
    assert blocks == num_blocks or blocks * block_bytes <= min(2**31, machine_bytes / 2)
    assert array_capacity(num_blocks, block_bytes, 0) == num_blocks


def test_pools_of_a_machine_have_arrays_of_one_size():
    """Of SmolLM2's blocks, up to the default pool of 2 GiB."""
    assert len({array_capacity(blocks, 64 * 23040, 2**34) for blocks in (1, 25, 49, 65, 1440)}) == 1
    # and so have machines that call themselves as large
    assert len({array_capacity(25, 64 * 23040, memory * 10**6) for memory in (3900, 4100, 4290)}) == 1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunnerConfig:
    """Of a small engine on one CPU, with the kernel that zeroes nothing, wherever this runs."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    made = read_setup(EngineArgs(model=folder, **SMALL), folder).runner_config(target_here("cpu"), progress=None)
    return dataclasses.replace(made, attention=dataclasses.replace(made.backend, cpu_untouched="kernel"))


def test_what_is_free_at_a_start_decides_no_array(config: RunnerConfig, monkeypatch: pytest.MonkeyPatch):
    """It differs from start to start, and none would find the programs of the one before."""
    monkeypatch.setattr(device_state, "reservable_memory", lambda: 2**32)

    def blocks(free: int) -> int:
        target = dataclasses.replace(config.target, total_bytes=free, free_bytes=free, host_bytes=free)
        return array_blocks(dataclasses.replace(config, target=target), 25)

    assert blocks(3 * 2**30) == blocks(3 * 2**30 - 10**7) > 25


def test_programs_know_what_of_their_state_nobody_writes(config: RunnerConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_state, "reservable_memory", lambda: 2**32)
    own = dataclasses.replace(config, attention=dataclasses.replace(config.backend, cpu_untouched=""))

    def made(config: RunnerConfig) -> tuple[int, int]:
        """Bytes of the state, and of those the ones to spare."""
        programs: Any = make_programs(config, config.params(), 25)
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(programs._state))
        return size, programs.spare_bytes

    (whole, spare), (used, none) = made(config), made(own)
    assert whole - used == spare > 0 == none


def test_nothing_is_reserved_where_it_counts_as_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("what is reserved takes memory elsewhere")
    mode, limit = tmp_path / "overcommit_memory", resource.RLIM_INFINITY
    monkeypatch.setattr(plan, "_OVERCOMMIT", mode)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert plan.reservable_memory() == psutil.virtual_memory().total
    mode.write_text("0\n")
    assert plan.reservable_memory() == psutil.virtual_memory().total
    mode.write_text("2\n")
    assert plan.reservable_memory() == 0
    mode.write_text("1\n")
    limit = 2**33
    assert plan.reservable_memory() == 0


@pytest.mark.parametrize("capacity", [row_capacity, lambda size, platform: block_capacity(size, 2**20, platform)])
def test_sizes_are_few(capacity):
    for platform in ("cpu", "cuda"):
        assert len({capacity(size, platform) for size in range(1, 257)}) <= (48 if capacity is not row_capacity else 6)


def test_a_cpus_engines_share_the_models_context():
    """SmolLM2's, and of a model whose own is too long for all."""
    assert {context_capacity(length, 8192, "cpu") for length in (1, 128, 1000, 4096, 8192)} == {8192}
    assert [context_capacity(length, 131072, "cpu") for length in (128, 8192, 8193, 40960)] == [
        *(8192, 8192),
        *(16384, 40960),
    ]
    assert context_capacity(2048, 131072, "cuda") == 2048
