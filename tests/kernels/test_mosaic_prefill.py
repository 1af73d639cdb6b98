"""Prefill attention in Mosaic, chosen by the api: against the formula, in Mosaic's interpreter (which also looks for
races) or on a Hopper GPU. The interpreter takes about a second for each block of threads, so cases are few and told.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import UNLIMITED, PagedCase, Sequences, Shape, arguments, sequences
from test_paged_attention import check

from pallas_kernels import mosaic_call
from pallas_kernels.backend import MOSAIC_COMPUTE_CAPABILITY, Backend, device_backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention import mosaic_tiles
from pallas_kernels.paged_attention.api import configurations, paged_attention

BF16: dict[str, Any] = dict(query="bfloat16", stored="bfloat16")
F16: dict[str, Any] = dict(query="float16", stored="float16")
#: the quickest one first: `make gpu-check`, rehearsed, takes one
CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "two tiles that see both ways, pages larger than a tile of keys": (
        Shape(heads=2, kv_heads=1, dim=256, block=128, tokens=70, causal=False, **BF16),
        dict(computed=(0,), queries=(70,), window=UNLIMITED, shared=0, magnitude=1.0),
    ),
    "a decode, a chunk, and a prompt": (
        Shape(heads=4, kv_heads=1, dim=64, block=16, tokens=26, spans=True, **BF16),
        dict(computed=(37, 120, 0), queries=(1, 3, 20), window=UNLIMITED, shared=0, magnitude=1.0, first=1),
    ),
    "a ring used twice, sinks and a soft cap": (
        Shape(heads=2, kv_heads=2, dim=64, block=32, tokens=8, softcap=10.0, sinks=True, **F16),
        dict(computed=(376,), queries=(5,), window=UNLIMITED, shared=0, magnitude=1.0),
    ),
    "a window that has left pages, and a group that does not divide a tile": (
        Shape(heads=7, kv_heads=1, dim=128, block=64, tokens=18, **BF16),
        dict(computed=(301,), queries=(18,), window=77, shared=0, magnitude=1000.0),
    ),
}


def compiled() -> Backend | None:
    """Mosaic on the GPU at hand; None: there is no GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    if device_backend(device).compute_capability != MOSAIC_COMPUTE_CAPABILITY:
        pytest.skip("the kernel is for GPUs of compute capability 9.0")
    return dataclasses.replace(device_backend(device), implementation="mosaic")


@pytest.fixture
def mosaic() -> Iterator[Backend]:
    """Where it runs; races fail the test."""
    if backend := compiled():
        yield backend
        return
    mosaic_call.reset_interpreter()
    yield Backend(implementation="mosaic", interpret=True)
    assert not mosaic_call.races_found()


def attend(case: PagedCase, backend: Backend) -> jax.Array:
    batch = dataclasses.replace(case.batch, backend=backend)
    how = arguments(case)
    scalars = {name: how.pop(name) for name in ("scale", "softcap", "causal")}
    return jax.jit(functools.partial(paged_attention, **scalars))(case.query, case.cache, case.layout, batch, **how)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_formula(name: str, mosaic: Backend):
    shape, drawn = CASES[name]
    case = PagedCase(dataclasses.replace(shape, seqs=len(drawn["queries"])), Sequences(**drawn, seed=3))
    out = np.array(attend(case, mosaic), np.float64)
    check(case, out)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [shape for shape, _ in CASES.values()], ids=str)
@given(data=st.data())
@settings(max_examples=30)
def test_random_batches_on_a_gpu(shape: Shape, data: st.DataObject):
    backend = compiled()
    if backend is None:
        pytest.skip("the interpreter is too slow for random batches")
    shape = dataclasses.replace(shape, tokens=200)
    case = PagedCase(shape, data.draw(sequences(shape)))
    check(case, np.array(attend(case, backend), np.float64))


def text(shape: Shape, backend: Backend) -> str:
    """The program of a shape."""
    case = PagedCase(shape, Sequences(computed=(0,), queries=(9,), window=9, shared=0, magnitude=1.0, seed=0))
    batch = dataclasses.replace(case.batch, backend=backend)
    attend = functools.partial(paged_attention, scale=0.5, kv_scales=arguments(case)["kv_scales"])
    return str(jax.make_jaxpr(attend)(case.query, case.cache, case.layout, batch))


def test_other_shapes_are_left_to_triton():
    mosaic, triton = (Backend(implementation=name) for name in ("mosaic", "triton"))
    taken = Shape(heads=2, kv_heads=1, dim=64, block=16, tokens=16, seqs=1, **BF16)
    assert text(taken, mosaic) != text(taken, triton)
    changes: list[dict[str, Any]] = [
        dict(query="float32"),
        dict(query="float32", stored="float32"),
        dict(stored="int8"),
        dict(dim=80),
    ]
    for change in changes:
        other = dataclasses.replace(taken, **change)
        assert text(other, mosaic) == text(other, triton)


TOKENS, SEQS = 512, 8


@functools.partial(jax.jit, static_argnames=("group", "causal"))
def tiles_of(batch: AttentionBatch, window: jax.Array, group: int, causal: bool) -> dict[str, jax.Array]:
    shape = mosaic_tiles.Shape(
        head_dim=64,
        block_size=16,
        kv_heads=1,
        group=group,
        width=1,
        dtype=jnp.bfloat16,
        scale=1.0,
        softcap=None,
        has_sinks=False,
        interpret=True,
    )
    layout = Layout(group=jnp.int32(0), page_offset=jnp.int32(0), window=window)
    return dataclasses.asdict(mosaic_tiles.Tiles.of(batch, layout, causal=causal, shape=shape))


@pytest.mark.thorough
@pytest.mark.parametrize(("group", "causal"), [(1, True), (7, True), (4, False)])
@given(
    queries=st.lists(st.integers(1, 80), min_size=1, max_size=6).map(sorted),
    window=st.sampled_from((1, 50, UNLIMITED)),
    data=st.data(),
)
@settings(max_examples=30)
def test_every_token_of_a_prompt_has_rows_that_see_what_it_may(
    group: int, causal: bool, queries: list[int], window: int, data: st.DataObject
):
    computed = [data.draw(st.integers(0, 300)) if causal else 0 for _ in queries]
    lengths = np.add(computed, queries)
    total, seqs, decodes = sum(queries), len(queries), queries.count(1)
    token_seq, positions = np.zeros((2, TOKENS), np.int32)
    token_seq[:total] = np.repeat(np.arange(seqs), queries)
    positions[:total] = np.concatenate([np.arange(b, b + n) for b, n in zip(computed, queries, strict=True)])
    fields: dict[str, Any] = dict(
        token_seq=token_seq,
        positions=positions,
        token_valid=np.arange(TOKENS) < total,
        query_start=np.pad(np.cumsum([0, *queries]), (0, SEQS - seqs), mode="edge").astype(np.int32),
        kv_lens=np.pad(lengths, (0, SEQS - seqs)).astype(np.int32),
        block_tables=np.zeros((1, SEQS, 1), np.int32),
        num_decodes=np.int32(decodes),
        num_seqs=np.int32(seqs),
    )
    batch = AttentionBatch(**fields)
    tiles = tiles_of(batch, jnp.int32(window), group=group, causal=causal)
    found = {name: np.asarray(x) for name, x in tiles.items()}
    token = np.arange(decodes, total)
    seq, position = token_seq[token], positions[token]
    tile, place = found["tile_of_token"][token], found["place_of_token"][token]
    assert len(set(zip(tile, place, strict=True))) == len(token)
    info, keys = found["info"][tile].T, 128
    assert (info[mosaic_tiles.SEQUENCE] == seq).all()
    assert (info[mosaic_tiles.ROW] + place * group == token * group).all()
    seen_from = np.maximum(position - window + 1, 0)
    seen_to = position + 1 if causal else lengths[seq]
    for head in range(group):
        assert (found["seen_from"][tile, place * group + head] == seen_from).all()
        assert (found["seen_to"][tile, place * group + head] == seen_to).all()
    assert (info[mosaic_tiles.FIRST] * keys <= seen_from).all() and (seen_to <= info[mosaic_tiles.LAST] * keys).all()
    whole_from, whole_to = info[mosaic_tiles.WHOLE_FROM], info[mosaic_tiles.WHOLE_TO]
    unmasked = whole_from < whole_to
    assert ((seen_from <= whole_from * keys) & (whole_to * keys <= seen_to))[unmasked].all()
    assert (info[mosaic_tiles.WRITTEN_FROM] <= seen_from).all()
    assert (info[mosaic_tiles.WRITTEN_TO] == lengths[seq]).all()
    # a block of threads without a token does nothing
    idle = np.setdiff1d(np.arange(len(found["info"])), tile)
    assert (found["info"][idle, mosaic_tiles.FIRST] == found["info"][idle, mosaic_tiles.LAST]).all()


def test_a_gpu_without_wgmma_is_refused():
    for capability in ((8, 0), (10, 0)):
        with pytest.raises(ValueError, match=r"'mosaic' needs a GPU of compute capability \(9, 0\).*use 'triton'"):
            Backend(implementation="mosaic", device_kind="another", compute_capability=capability)


def test_cases_of_mosaic_are_for_hopper_alone():
    mosaic = [case for case in configurations() if case.label.endswith("in Mosaic")]
    assert any("Llama-3.1-8B" in case.label for case in mosaic)
    assert not any("float32" in case.label or "Phi-2" in case.label or "decode" in case.label for case in mosaic)
    for case in mosaic:
        assert [case.runs_on(capability) for capability in ((8, 0), (9, 0), (10, 0))] == [False, True, False]
