"""Paged attention, every implementation, against the formula in float64: over random batches, pages, windows and
scores.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import UNLIMITED, PagedCase, Sequences, Shape, arguments, as_stored, sequences
from support.kept_kernels import KERNELS_FOLDER

from pallas_kernels.backend import Backend
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.paged_attention import cpu_ffi, reference
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.tiles import DecodeTile
from pallas_kernels.paged_attention.triton_decode import decode_attention

#: every option, and every kind of pages, at least once; few, as each is compiled
SHAPES = (
    Shape(heads=4, kv_heads=4, dim=8, block=16, sinks=True),
    Shape(heads=6, kv_heads=2, dim=24, block=32, softcap=1.5, query="float16", stored="float16", spans=True),
    Shape(heads=3, kv_heads=1, dim=80, block=8, tokens=24, stored="int8"),
    Shape(heads=20, kv_heads=1, dim=16, block=128, tokens=40, softcap=4.0, query="bfloat16", stored="float8_e4m3fn"),
    Shape(heads=6, kv_heads=3, dim=10, block=64, stored="uint16"),
    Shape(heads=4, kv_heads=2, dim=16, block=16, causal=False, query="bfloat16", stored="bfloat16"),
    Shape(heads=2, kv_heads=1, dim=16, block=16, tokens=20, decode_only=True, query="float16", stored="float8_e5m2"),
    # room for long runs of queries ("xla"), in products of bfloat16
    Shape(heads=2, kv_heads=1, dim=16, block=16, tokens=300, query="bfloat16", stored="uint16", spans=True),
    # few sequences: "xla" has smaller tiles for the last ones of them
    Shape(heads=4, kv_heads=2, dim=16, block=64, tokens=16, seqs=8, stored="uint16"),
    # many heads over few numbers: "cpu_ffi" has them in registers in several turns
    Shape(heads=18, kv_heads=2, dim=32, block=64, tokens=8, seqs=8, softcap=3.0, stored="float8_e4m3fn"),
    # what "cpu_ffi" has AMX for, where it is: tiles of queries that are whole, and that are not
    Shape(heads=9, kv_heads=3, dim=64, block=64, tokens=160, seqs=4, query="bfloat16", stored="uint16", sinks=True),
    Shape(heads=2, kv_heads=2, dim=96, block=64, tokens=70, seqs=3, query="bfloat16", stored="uint16"),
    # no power of two: "triton" leaves it to "xla", with keys as it has written them
    Shape(heads=2, kv_heads=1, dim=8, block=96, tokens=20),
)
IMPLEMENTATIONS = ("reference", "xla", "triton")
#: without a kernel of "cpu_ffi": too many heads, heads of no multiple of 8 numbers
WITHOUT = SHAPES[3], SHAPES[4]


def backend(implementation: str, interpret: bool, shape: Shape | None = None) -> Backend:
    if implementation == "cpu_ffi" and shape is not None:
        return Backend(cpu_attention=kernels(shape))
    kind = "" if interpret else jax.devices()[0].device_kind
    return Backend(implementation=implementation, interpret=interpret, device_kind=kind)


@functools.cache
def kernels(shape: Shape) -> tuple[str, ...]:
    """The kernel of `cpu_ffi` for a shape, loaded."""
    form = cpu_ffi.form_of(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        block_size=shape.block,
        stored=shape.number.name,
        transposed=Backend().transposes_keys(shape.block),
        has_softcap=shape.softcap is not None,
        dtype=shape.query,
    )
    if form is None:
        return ()
    assert cpu_ffi.Form.named(form.name) == form
    return (cpu_ffi.load(form, KERNELS_FOLDER),)


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "causal"))
def attend(query, cache, layout, batch, **how):
    return paged_attention(query, cache, layout, batch, **how)


def test_which_shapes_have_a_kernel_for_cpus():
    for shape in SHAPES:
        assert bool(kernels(shape)) == (shape not in WITHOUT), shape
    # and which of them have tiles, where there is AMX
    with_tiles = [shape for shape in SHAPES if any("m" in name.partition("-")[2] for name in kernels(shape))]
    assert with_tiles == ([SHAPES[10], SHAPES[11]] if amx.is_usable() else [])
    # of heads that no model has, the code would have no end
    assert not kernels(Shape(heads=2, kv_heads=1, dim=3 * 2**15, block=16))


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "cpu_ffi"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
@settings(max_examples=20)
def test_attention_is_the_formula(implementation: str, shape: Shape, interpret: bool, data: st.DataObject):
    case = PagedCase(shape, data.draw(sequences(shape)))
    batch = dataclasses.replace(case.batch, backend=backend(implementation, interpret, shape))
    out = attend(case.query, as_stored(case.cache, batch.backend), case.layout, batch, **arguments(case))
    check(case, np.asarray(out).astype(np.float64))


@pytest.mark.parametrize("queries", [(95, 96), (191,), (192, 97), (1, 255), (256,), (1, 1, 257), (300,)], ids=str)
def test_runs_that_lack_a_quarter_or_more(queries: tuple[int, ...]):
    """ "xla" rounds the number of long runs up from three quarters of a run on."""
    shape = Shape(heads=2, kv_heads=1, dim=16, block=16, tokens=300)
    drawn = Sequences(computed=(30,) * len(queries), queries=queries, window=UNLIMITED, shared=0, magnitude=1.0, seed=0)
    case = PagedCase(shape, drawn)
    batch = dataclasses.replace(case.batch, backend=Backend(implementation="xla"))
    check(case, np.asarray(attend(case.query, case.cache, case.layout, batch, **arguments(case))).astype(np.float64))


@pytest.mark.parametrize("decodes", [1, 2, 3, 4, 5, 6, 7, 8])
def test_single_tokens_in_tiles_of_two_sizes(decodes: int):
    """ "xla" leaves up to four sequences to tiles of two, if there is room for few."""
    shape = Shape(heads=4, kv_heads=2, dim=16, block=64, tokens=16, seqs=8, stored="uint16")
    computed = tuple(range(380, 380 - 25 * decodes, -25))
    drawn = Sequences(computed=computed, queries=(1,) * decodes, window=UNLIMITED, shared=0, magnitude=1.0, seed=0)
    case = PagedCase(shape, drawn)
    batch = dataclasses.replace(case.batch, backend=Backend(implementation="xla"))
    out = attend(case.query, as_stored(case.cache, batch.backend), case.layout, batch, **arguments(case))
    check(case, np.asarray(out).astype(np.float64))


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "cpu_ffi"))
def test_the_first_position_can_be_out_of_sight(implementation: str, interpret: bool):
    """Of single tokens, chunks, and prompts, whose first token sees nothing then."""
    shape = Shape(heads=4, kv_heads=2, dim=16, block=16, tokens=24)
    drawn = Sequences(
        computed=(40, 0, 0, 17), queries=(1, 1, 5, 12), window=UNLIMITED, shared=0, magnitude=1.0, seed=1, first=1
    )
    case = PagedCase(shape, drawn)
    batch = dataclasses.replace(case.batch, backend=backend(implementation, interpret, shape))
    out = attend(case.query, as_stored(case.cache, batch.backend), case.layout, batch, **arguments(case))
    check(case, np.asarray(out).astype(np.float64))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[8], SHAPES[9]], ids=str)
@pytest.mark.parametrize("window", [UNLIMITED, 5, 40])
def test_drafts_on_a_cpu_are_single_tokens_to_the_bit(shape: Shape, window: int):
    """Several queries of a sequence, of which the last ones are no drafts (and their places hold NaN), a sequence that
    takes no part, and one that has no context.
    """
    width, counts, computed = 6, (6, 1, 4, 0, 5, 2), (100, 40, 0, 3, 7, 250)
    seqs = len(counts)
    shape = dataclasses.replace(shape, tokens=width * seqs, seqs=seqs)
    drawn = Sequences(computed=computed, queries=counts, window=window, shared=0, magnitude=1.0, seed=2)
    case, lane, before = PagedCase(shape, drawn), np.arange(width), np.asarray(computed)
    ragged = dataclasses.replace(case.batch, backend=backend("cpu_ffi", False, shape))
    place = np.concatenate([seq * width + lane[:count] for seq, count in enumerate(counts)])
    query = np.ones_like(case.query)
    query[place] = case.query[: len(place)]
    batch = dataclasses.replace(
        ragged,
        token_seq=jnp.repeat(jnp.arange(seqs), width),
        positions=jnp.asarray((before[:, None] + lane).reshape(-1), jnp.int32),
        token_valid=jnp.asarray((lane < np.asarray(counts)[:, None]).reshape(-1)),
        query_start=jnp.arange(seqs + 1, dtype=jnp.int32) * width,
        kv_lens=jnp.asarray(before + width, jnp.int32),
        num_decodes=jnp.int32(0),
        longest=width,
    )
    cache, how = as_stored(case.cache, batch.backend), arguments(case)
    out = np.asarray(attend(query, cache, case.layout, batch, **how)).astype(np.float64)
    assert not np.delete(out, place, axis=0).any()
    found = np.zeros(case.query.shape)
    found[: len(place)] = out[place]
    check(case, found)
    for column in range(width):
        one = dataclasses.replace(
            batch,
            token_seq=jnp.arange(seqs),
            positions=batch.positions[column::width],
            token_valid=batch.token_valid[column::width],
            query_start=jnp.arange(seqs + 1, dtype=jnp.int32),
            num_decodes=jnp.int32(seqs),
            decode_only=True,
        )
        alone = np.asarray(attend(query[column::width], cache, case.layout, one, **how)).astype(np.float64)
        np.testing.assert_array_equal(alone, out[column::width])


def check(case: PagedCase, out: np.ndarray) -> None:
    """That `out` [tokens, heads, dim] is right where there are tokens, and finite elsewhere."""
    assert np.isfinite(out).all()
    for seq in range(len(case.lengths)):
        expected, bound = case.expected(seq)
        error = abs(out[case.tokens(seq)] - expected)
        assert (error <= bound).all(), f"sequence {seq}: error {error.max()}, {(error / bound).max()} times the bound"


@functools.partial(jax.jit, static_argnames=("splits", "scale", "softcap"))
def decode(query, cache, layout, batch, **how):
    tile = DecodeTile(rows=16, block_n=32, num_warps=4, num_stages=2, least_pieces=2, programs_per_sm=1)
    return decode_attention(query, cache, layout, batch, tile, num_sms=1, **how)


@pytest.mark.parametrize("splits", [1, 2, 8])
@given(data=st.data())
@settings(max_examples=20)
def test_the_parts_of_a_split_context_are_one(splits: int, interpret: bool, data: st.DataObject):
    """Also where a part is empty, and where there are more parts than pieces of context."""
    shape = Shape(heads=8, kv_heads=2, dim=16, block=16, tokens=20, decode_only=True, sinks=True)
    case = PagedCase(shape, data.draw(sequences(shape)))
    batch = dataclasses.replace(case.batch, backend=backend("triton", interpret, shape))
    how = arguments(case)
    del how["causal"]
    out = decode(case.query, case.cache, case.layout, batch, splits=splits, **how)
    out = np.where(np.arange(len(out))[:, None, None] < len(case.lengths), np.asarray(out), 0)
    check(case, out.astype(np.float64))


def test_gradients_of_the_reference():
    """Of queries, keys and values, against differences of the formula in float64; none is NaN, poison or not."""
    shape = Shape(heads=4, kv_heads=2, dim=8, block=16, tokens=24, sinks=True, softcap=2.0)
    drawn = Sequences(computed=(40, 0, 17), queries=(1, 5, 12), window=30, shared=0, magnitude=1.0, seed=1)
    case = PagedCase(shape, drawn)
    random = np.random.default_rng(0)
    towards = random.standard_normal(case.query.shape)

    def loss(query: jax.Array, cache: jax.Array) -> jax.Array:
        batch = dataclasses.replace(case.batch, backend=Backend(implementation="reference"))
        out = reference.paged_attention(query, cache, case.layout, batch, **arguments(case))
        return jnp.sum(out * towards)

    def formula() -> float:
        return sum(float((case.expected(i)[0] * towards[case.tokens(i)]).sum()) for i in range(len(case.lengths)))

    of_query, of_cache = jax.grad(loss, argnums=(0, 1))(jnp.asarray(case.query), jnp.asarray(case.cache))
    of_query, of_cache = np.asarray(of_query, np.float64), np.asarray(of_cache, np.float64)
    assert np.isfinite(of_query).all() and np.isfinite(of_cache).all()
    assert not of_cache[np.isnan(case.cache)].any()
    step = 1e-5
    case.query = case.query.astype(np.float64)

    def difference(arrays: list[np.ndarray], directions: list[np.ndarray]) -> float:
        results = []
        for sign in (1, -1):
            for array, direction in zip(arrays, directions, strict=True):
                array += sign * step * direction
            results.append(formula())
            for array, direction in zip(arrays, directions, strict=True):
                array -= sign * step * direction
        return (results[0] - results[1]) / (2 * step)

    direction = random.standard_normal(case.query.shape)
    assert difference([case.query], [direction]) == pytest.approx(float((of_query * direction).sum()), rel=1e-4)
    for of_half, arrays in zip(np.split(of_cache, 2, axis=1), (case.keys, case.values), strict=True):
        directions = [random.standard_normal(x.shape) for x in arrays]
        expected = difference(arrays, directions)
        found = 0.0
        for seq, along in enumerate(directions):
            for at in case.visible(seq):
                page = shape.num_blocks + case.table[seq, at // shape.block]
                found += float((of_half[page, :, at % shape.block] * along[at]).sum())
        assert found == pytest.approx(expected, rel=1e-4)
