"""Arrays that do not belong together are refused by name, whatever would compute with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention

TOKENS, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
LAYOUT = Layout(group=jnp.int32(0), page_offset=jnp.int32(0), window=jnp.int32(99))


def batch(implementation: str) -> AttentionBatch:
    tokens, one = jnp.zeros(TOKENS, jnp.int32), jnp.ones(1, jnp.int32)
    return AttentionBatch(
        token_seq=tokens,
        positions=tokens,
        token_valid=tokens == 0,
        query_start=jnp.zeros(2, jnp.int32),
        kv_lens=one,
        block_tables=jnp.ones((1, 1, 1), jnp.int32),
        num_decodes=jnp.int32(0),
        num_seqs=jnp.int32(1),
        backend=Backend(implementation=implementation, interpret=True),
    )


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


CACHE = array(4, 2, KV_HEADS, 16, DIM)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"query": array(TOKENS, 5, DIM)}, "query must be .* a multiple of 2, 16], got .8, 5, 16"),
        ({"query": array(TOKENS, HEADS, 8)}, "query must be .* got .8, 4, 8"),
        ({"query": array(TOKENS - 1, HEADS, DIM)}, "query must be .8 .the batch's"),
        ({"query": array(TOKENS, HEADS, DIM, dtype=jnp.int32)}, "query must be of a float dtype, got int32"),
        ({"cache": array(4, KV_HEADS, 16, DIM)}, "cache must be .pages, 2, kv_heads"),
        ({"cache": CACHE.astype(jnp.int32)}, "got int32"),
        ({"cache": CACHE.astype(jnp.int8)}, "a cache of int8 needs kv_scales of shape .4, 2, 2, 16"),
        ({"kv_scales": array(4, 2, KV_HEADS, 16)}, "a cache of float32 takes no kv_scales"),
        ({"cache": CACHE.astype(jnp.int8), "kv_scales": array(4, 2, KV_HEADS)}, "kv_scales must be of shape"),
        ({"sinks": array(3)}, "sinks must be of shape .4., one a query head, got .3."),
    ],
)
def test_attention_refuses(implementation: str, changed: dict[str, Any], text: str):
    operands = {"query": array(TOKENS, HEADS, DIM), "cache": CACHE, **changed}
    with pytest.raises(ValueError, match=text):
        paged_attention(layout=LAYOUT, batch=batch(implementation), scale=1.0, **operands)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"key": array(TOKENS, 3, DIM)}, "key must be .* 2, 16], got .8, 3, 16"),
        ({"value": array(TOKENS, KV_HEADS, 8)}, "value must be .* got .8, 2, 8"),
        ({"cache": CACHE.astype(jnp.int8)}, "needs kv_scales"),
    ],
)
def test_writing_refuses(implementation: str, changed: dict[str, Any], text: str):
    rows = array(TOKENS, KV_HEADS, DIM)
    operands = {"cache": CACHE, "key": rows, "value": rows, **changed}
    with pytest.raises(ValueError, match=text):
        write_kv(layout=LAYOUT, batch=batch(implementation), **operands)
