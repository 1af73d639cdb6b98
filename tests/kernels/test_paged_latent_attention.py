"""Attention over latents, every implementation, against the formula in float64; and what writing them leaves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import LAYER, SCALE, PagedCase, Sequences, Shape, sequences
from support.kept_kernels import KERNELS_FOLDER
from test_kv_write import quantized
from test_paged_attention import IMPLEMENTATIONS, backend, check

from pallas_kernels.backend import Backend
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention import cpu_ffi
from pallas_kernels.paged_attention.configurations import Heads
from pallas_kernels.paged_attention.tiles import DecodeTile
from pallas_kernels.paged_attention.triton_decode import decode_attention
from pallas_kernels.paged_latent_attention.api import paged_latent_attention
from pallas_kernels.paged_latent_attention.bench import LatentWorkload, measure
from pallas_kernels.paged_latent_attention.configurations import LatentStep

#: shapes, and how many of the latents' numbers are their value
SHAPES = (
    (Shape(heads=4, kv_heads=1, dim=24, block=16), 16),
    (Shape(heads=20, kv_heads=1, dim=40, block=64, tokens=40, query="bfloat16", stored="bfloat16"), 32),
    (Shape(heads=3, kv_heads=1, dim=18, block=8, tokens=24, query="bfloat16", stored="uint16"), 10),
    (Shape(heads=1, kv_heads=1, dim=72, block=64, tokens=20, decode_only=True, query="float16", stored="float16"), 64),
    (Shape(heads=4, kv_heads=1, dim=24, block=16, query="float16", stored="int8"), 16),
    (Shape(heads=20, kv_heads=1, dim=40, block=64, tokens=40, query="bfloat16", stored="float8_e4m3fn"), 32),
    # DeepSeek's: "cpu_ffi" has them in groups
    (Shape(heads=16, kv_heads=1, dim=576, block=16, tokens=40, query="bfloat16", stored="uint16"), 512),
    # no power of two: "triton" leaves it to "xla"
    (Shape(heads=2, kv_heads=1, dim=12, block=96, tokens=20), 8),
)
#: without a kernel of "cpu_ffi": latents, or values, of no multiple of 8 numbers
WITHOUT = SHAPES[2], SHAPES[7]


@functools.cache
def kernels(shape: Shape, value_width: int) -> tuple[str, ...]:
    """The kernel of "cpu_ffi" for a shape, loaded."""
    form = cpu_ffi.latent_form_of(
        heads=shape.heads,
        width=shape.dim,
        value_width=value_width,
        block_size=shape.block,
        stored=shape.number.name,
    )
    if form is None:
        return ()
    assert cpu_ffi.Form.named(form.name) == form
    return (cpu_ffi.load(form, KERNELS_FOLDER),)


def test_which_shapes_have_a_kernel_for_cpus():
    for shape in SHAPES:
        assert bool(kernels(*shape)) == (shape not in WITHOUT), shape


class LatentCase(PagedCase):
    """Keys alone, in pages of their own; their first numbers are the values."""

    def __init__(self, shape: Shape, drawn: Sequences, value_width: int):
        super().__init__(shape, drawn)
        self.cache = np.ascontiguousarray(self.cache[:, 0])
        self.scales = None if self.scales is None else np.ascontiguousarray(self.scales[:, 0])
        self.values = [keys[..., :value_width] for keys in self.keys]


@functools.partial(jax.jit, static_argnames=("scale", "value_width"))
def attend(query, cache, layout, batch, kv_scales, **how):
    return paged_latent_attention(query, cache, layout, batch, kv_scales=kv_scales, **how)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "cpu_ffi"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda pair: f"{pair[0]}-value{pair[1]}")
@given(data=st.data())
@settings(max_examples=8)
def test_attention_is_the_formula(implementation: str, shape: tuple[Shape, int], interpret: bool, data: st.DataObject):
    case = LatentCase(shape[0], data.draw(sequences(shape[0])), shape[1])
    by_kernel = implementation == "cpu_ffi"
    chosen = Backend(cpu_attention=kernels(*shape)) if by_kernel else backend(implementation, interpret)
    batch = dataclasses.replace(case.batch, backend=chosen)
    out = attend(case.query, case.cache, case.layout, batch, case.scales, scale=SCALE, value_width=shape[1])
    assert out.shape == (shape[0].tokens, shape[0].heads, shape[1])
    check(case, np.asarray(out).astype(np.float64))


@functools.partial(jax.jit, static_argnames=("splits", "scale", "value_width"))
def decode(query, cache, layout, batch, **how):
    tile = DecodeTile(rows=16, block_n=32, num_warps=4, num_stages=2, least_pieces=2, programs_per_sm=1)
    return decode_attention(query, cache, layout, batch, tile, num_sms=1, **how)


@given(data=st.data())
@settings(max_examples=8)
def test_the_parts_of_a_split_context_are_one(interpret: bool, data: st.DataObject):
    shape = Shape(heads=20, kv_heads=1, dim=24, block=16, tokens=20, decode_only=True)
    case = LatentCase(shape, data.draw(sequences(shape)), 16)
    batch = dataclasses.replace(case.batch, backend=backend("triton", interpret))
    out = decode(case.query, case.cache, case.layout, batch, splits=4, scale=SCALE, value_width=16)
    out = np.where(np.arange(len(out))[:, None, None] < len(case.lengths), np.asarray(out), 0)
    check(case, out.astype(np.float64))


@jax.jit
def write(cache, latents, layout, batch, scales):
    return write_kv(cache, latents, None, layout, batch, scales)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=1, kv_heads=1, dim=24, block=16),
        Shape(heads=1, kv_heads=1, dim=10, block=64, tokens=1, query="bfloat16", stored="uint16"),
        Shape(heads=1, kv_heads=1, dim=24, block=16, stored="int8"),
    ],
    ids=str,
)
@given(data=st.data())
@settings(max_examples=8)
def test_new_latents_are_written_and_no_others(implementation: str, shape: Shape, interpret: bool, data: st.DataObject):
    case = LatentCase(shape, data.draw(sequences(shape)), shape.dim - 2)
    new = np.random.default_rng(case.drawn.seed).standard_normal((shape.tokens, 1, shape.dim))
    new = new.astype(np.float32 if shape.has_scales else shape.number)
    batch = dataclasses.replace(case.batch, backend=backend(implementation, interpret))
    expected, expected_scales = case.cache.copy(), None if case.scales is None else case.scales.copy()
    numbers, scales = (new, None) if not shape.has_scales else quantized(new, shape.number)
    for seq, before in enumerate(case.drawn.computed):
        for i, token in enumerate(range(*case.tokens(seq).indices(shape.tokens))):
            at = before + i
            page = LAYER * shape.num_blocks + case.table[seq, at // shape.block]
            expected[page, at % shape.block] = numbers[token, 0].view(expected.dtype)
            if scales is not None and expected_scales is not None:
                expected_scales[page, at % shape.block] = scales[token, 0]
    found, found_scales = write(case.cache, jnp.asarray(new, jnp.dtype(shape.query)), case.layout, batch, case.scales)
    # page 0 takes the padding
    if expected_scales is None:
        np.testing.assert_array_equal(np.asarray(found)[1:].view(np.uint8), expected[1:].view(np.uint8))
    else:
        np.testing.assert_allclose(np.asarray(found_scales)[1:], expected_scales[1:], rtol=1e-6)
        # a number between two integers may be rounded to either
        assert np.abs(np.asarray(found)[1:].astype(np.int32) - expected[1:]).max() <= 1


def test_gradients_of_the_reference_are_those_of_expanded_keys_and_values():
    """Of queries and latents, where attention is computed over latents as keys and values of one head."""
    from pallas_kernels.paged_attention import reference
    from pallas_kernels.paged_latent_attention import reference as latent_reference

    shape = Shape(heads=3, kv_heads=1, dim=12, block=16, tokens=24)
    drawn = Sequences(computed=(40, 0, 17), queries=(1, 5, 12), window=30, shared=0, magnitude=1.0, seed=1)
    case = LatentCase(shape, drawn, 8)
    batch = dataclasses.replace(case.batch, backend=Backend(implementation="reference"))

    def latents(query: jax.Array, cache: jax.Array) -> jax.Array:
        out = latent_reference.paged_latent_attention(query, cache, case.layout, batch, scale=SCALE, value_width=8)
        return jnp.sum(jnp.sin(out))

    def expanded(query: jax.Array, cache: jax.Array) -> jax.Array:
        both = jnp.stack([cache, cache], axis=1)
        return jnp.sum(jnp.sin(reference.paged_attention(query, both, case.layout, batch, scale=SCALE)[..., :8]))

    query, cache = jnp.asarray(case.query), jnp.asarray(case.cache)
    found, wanted = (jax.grad(loss, argnums=(0, 1))(query, cache) for loss in (latents, expanded))
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.isfinite(ours).all() and np.abs(ours).max() > 0.01
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_benchmark_runs_and_counts():
    heads = Heads(model="small", heads=4, kv_heads=1, head_dim=24)
    load = LatentWorkload(
        heads=heads, seqs=2, computed=10, queries=1, value_width=16, block_size=16, query="float32", stored="float32"
    )
    assert load.read_bytes == 2 * 11 * 24 * 4
    result = measure(Backend(implementation="triton", interpret=True), load, page_bytes=0, repeats=1)
    assert result["us"] > 0 and np.isfinite(result["GB/s"]) and np.isfinite(result["TFLOP/s"])


def _step(**changed: Any) -> tuple[Any, ...]:
    heads = Heads(model="small", heads=4, kv_heads=1, head_dim=24)
    options: dict[str, Any] = dict(query="bfloat16", block_size=16, **changed)
    step = LatentStep(heads=heads, tokens=8, seqs=4, context=64, cache_bytes=2**16, value_width=16, **options)
    query = jax.ShapeDtypeStruct((8, 4, 24), jnp.bfloat16)
    return query, step.cache()[0], step.layout(), step.batch(Backend(implementation="triton", interpret=True))


@pytest.mark.parametrize("decode_only", [True, False])
def test_chunks_and_single_tokens_have_a_kernel_each(decode_only: bool):
    function = functools.partial(paged_latent_attention, scale=1.0, value_width=16)
    jaxpr = str(jax.make_jaxpr(function)(*_step(decode_only=decode_only)))
    assert ("name=paged_attention_decode" in jaxpr) and ("name=paged_attention_prefill" in jaxpr) != decode_only


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"cache": jnp.zeros((4, 2, 16, 24))}, r"a cache of latents must be \[pages, block_size, width\], got .4, 2"),
        ({"cache": jnp.zeros((4, 16, 24), jnp.int32)}, "of a float dtype, int8, uint16 .*, got int32"),
        ({"cache": jnp.zeros((4, 16, 24), jnp.int8)}, r"a cache of int8 needs kv_scales of shape .4, 16."),
        ({"kv_scales": jnp.zeros((4, 16))}, "a cache of bfloat16 takes no kv_scales"),
        ({"query": jnp.zeros((8, 4, 16))}, r"query must be .8 \(the batch's\), heads, 24., got .8, 4, 16."),
        ({"query": jnp.zeros((7, 4, 24))}, r"query must be .8 \(the batch's\)"),
        ({"query": jnp.zeros((8, 4, 24), jnp.int32)}, "query must be of a float dtype, got int32"),
        ({"value_width": 24}, "value_width must be between 0 and the latents' 24 numbers, got 24"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(changed: dict[str, Any], text: str):
    query, cache, layout, batch = _step()
    given = {"query": query, "cache": cache, "value_width": 16, **changed}
    with pytest.raises(ValueError, match=text):
        paged_latent_attention(layout=layout, batch=batch, scale=1.0, **given)


def test_writing_refuses_latents_of_several_heads():
    _, cache, layout, batch = _step()
    with pytest.raises(ValueError, match=r"key must be .8 \(the batch's\), 1, 24., got .8, 2, 24."):
        write_kv(cache, jnp.zeros((8, 2, 24)), None, layout, batch)
