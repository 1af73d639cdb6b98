"""Which kernels a step launches, and which tiles they are compiled with."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.backend import MAX_HEAD_DIM, Backend
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.configurations import Heads, Step
from pallas_kernels.paged_attention.tiles import DecodeTile, decode_splits, tiles

SMALL = Heads(model="small", heads=4, kv_heads=2, head_dim=16)
LARGE = Heads(model="large", heads=2, kv_heads=1, head_dim=MAX_HEAD_DIM + 1)
DEVICES = ("", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA L4")


def kernels(heads: Heads, backend: Backend, **options: Any) -> list[str]:
    """Names of the kernels that a step of attention and one of writing launch."""
    step = Step(heads=heads, tokens=8, seqs=4, context=64, cache_bytes=2**20, **{"query": "bfloat16", **options})
    query = jax.ShapeDtypeStruct((8, heads.heads, heads.head_dim), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((8, heads.kv_heads, heads.head_dim), jnp.bfloat16)

    def both(query, new, cache, scales, layout, batch):
        cache, scales = write_kv(cache, new, new, layout, batch, scales)
        return paged_attention(query, cache, layout, batch, scale=1.0, kv_scales=scales)

    jaxpr = jax.make_jaxpr(both)(query, new, *step.cache(), step.layout(), step.batch(backend))
    return re.findall(r"name=(kv_write|paged_attention_\w+)", str(jaxpr))


TRITON = Backend(implementation="triton", interpret=True)
AMPERE = Backend(implementation="triton", compute_capability=(8, 0))
ADA = Backend(implementation="triton", compute_capability=(8, 9))
ALL = ["kv_write", "paged_attention_decode", "paged_attention_prefill"]


def test_chunks_and_single_tokens_have_a_kernel_each():
    assert kernels(SMALL, TRITON) == ALL
    assert kernels(SMALL, TRITON, decode_only=True) == ALL[:2]


def test_what_kernels_cannot_do_is_done_by_xla():
    assert kernels(LARGE, TRITON) == ["kv_write"]
    assert kernels(SMALL, Backend()) == kernels(SMALL, Backend(implementation="reference")) == []
    assert kernels(SMALL, AMPERE, stored="float8_e4m3fn") == []
    assert kernels(SMALL, AMPERE, stored="int8") == kernels(SMALL, ADA, stored="float8_e4m3fn") == ALL


def test_no_pallas_without_kernels():
    """Nothing of Pallas is imported until a kernel is: on a CPU it would only make the start slower."""
    code = """
import sys
from pallas_kernels.kv_write import api
from pallas_kernels.paged_attention import api
import jaxllm.runner.heads.sampling_step
assert not {"jax.experimental.pallas", "pallas_kernels.triton_call"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
@given(head_dim=st.integers(1, MAX_HEAD_DIM))
def test_every_device_has_tiles(device: str, itemsize: int, head_dim: int):
    found = tiles(device, head_dim=head_dim, itemsize=itemsize)
    for size in (found.decode.rows, found.decode.block_n, found.prefill.rows, found.prefill.block_n):
        assert size >= 16 and size & (size - 1) == 0
    assert found.num_sms > 0


def test_devices_are_told_apart_by_whole_words():
    sms = {name: tiles(name, head_dim=128, itemsize=2).num_sms for name in (*DEVICES, "NVIDIA L40S", "NVIDIA H200 NVL")}
    assert sms["NVIDIA H200"] == sms["NVIDIA H200 NVL"] == 132
    assert sms["NVIDIA L4"] == 58 and sms["NVIDIA L40S"] == sms[""]


@given(st.integers(1, 8), st.integers(4, 7), st.integers(1, 4096), st.integers(16, 2**17), st.integers(1, 200))
def test_contexts_are_split_as_far_as_it_pays(least: int, block: int, programs: int, context: int, num_sms: int):
    tile = DecodeTile(rows=16, block_n=2**block, num_warps=4, num_stages=2, least_pieces=least, programs_per_sm=8)
    splits = decode_splits(tile, programs, context, num_sms)
    assert splits >= 1 and splits & (splits - 1) == 0
    assert splits == 1 or context // splits >= tile.block_n * least
    busy = splits * programs * 2 > tile.programs_per_sm * num_sms
    assert busy or 2 * splits * tile.block_n * least > context
