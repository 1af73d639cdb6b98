"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1): what the cache keeps of a token is one
latent vector, of which every head's keys and values are made, and a key that is turned by the token's position.

Keys and values of a context are never made. With a head's projection K of latents c to keys, and V to values,

    q . (K c) = (K' q) . c        sum of w_i (V c_i) = V (sum of w_i c_i)

so queries take the projection of the keys in front of attention, and its result that of the values behind: attention of
all heads over the latents themselves. DeepSeek-V3's latents have 512 numbers, and 64 that are turned: 1,152 bytes a
token and layer in bfloat16, where its 128 heads' keys and values would be 81,920.

That takes 512 + 64 + 512 products a head of a query with a token that it sees, where a key and a value take 128 + 64 +
128; either way a token's own projections are as many. So where a chunk of a prompt sees itself alone, its keys and
values are made, on a CPU (`chunk_attention.py`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.attention import Cache, Layout, ScaledPages, latent_attention, write_latents
from jaxllm.layers.chunk_attention import begin_their_sequences, chunk_attention, single_tokens
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.dense_attention import WholeSequences
from jaxllm.layers.linear import linear, matmul_precision
from jaxllm.layers.norm import rms_norm
from jaxllm.layers.rope import apply_rope
from pallas_kernels.batch import AttentionBatch
from pallas_kernels.quantized import dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Shapes of one model's latent attention."""

    #: numbers that queries are made of; None: they are made of the hidden states
    query_rank: int | None
    #: numbers of a latent that keys and values are made of
    rank: int
    #: numbers of a head's query and key that stay as they are, that are turned, and of its value
    plain_dim: int
    turned_dim: int
    value_dim: int
    #: of the norms of `query_rank` and of `rank` numbers
    norm_eps: float = 1e-6

    @property
    def width(self) -> int:
        """Numbers that the cache keeps of a token."""
        return self.rank + self.turned_dim

    @property
    def query_dim(self) -> int:
        """Numbers of a head's query."""
        return self.plain_dim + self.turned_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentWeights:
    """Stacked as `models.params.Layers`, or of one layer, without the first axis. L layers, d hidden size, H heads;
    q, r, p, t, v: query_rank, rank, plain_dim, turned_dim, value_dim of `LatentConfig`.
    """

    down: jax.Array  # [L, q + r + t, d]; where queries are made of hidden states [L, r + t, d]
    query_norm: jax.Array | None  # [L, q]
    query_up: jax.Array  # [L, H * (p + t), q]; or of d
    norm: jax.Array  # [L, r]
    #: of keys of all heads, then of their values
    up: jax.Array  # [L, H * (p + v), r]


#: tokens of the smallest bucket whose programs also make keys and values
EXPANDED_TOKENS = 512
#: the fields of `LatentWeights` that `linear` multiplies by
LATENT_MATRICES = ("down", "query_up")


def latent_branch(
    context: Context,
    config: LatentConfig,
    w: LatentWeights,
    layout: Layout,
    cos: jax.Array,
    sin: jax.Array,
    x: jax.Array,
    cache: Cache,
    batch: StepBatch,
    *,
    scale: float,
    interleaved: bool,
) -> tuple[jax.Array, Cache]:
    """What the heads of one layer see of hidden states x [T, d], without the projection behind them.

    Args:
        w: of one layer; where heads are split over devices, one device's.
        cos, sin: [T, turned_dim // 2].
        scale: factor on the scores.
        interleaved: see `apply_rope`.

    Returns:
        ([T, H * v], cache).
    """
    c, tokens = config, x.shape[0]
    down, query = linear(context, x, w.down), x
    if w.query_norm is not None:
        query, down = jnp.split(down, [c.query_rank or 0], axis=1)
        query = rms_norm(query, w.query_norm, c.norm_eps)
    query = linear(context, query, w.query_up).reshape(tokens, -1, c.query_dim)
    heads = query.shape[1]
    latent = rms_norm(down[:, : c.rank], w.norm, c.norm_eps)[:, None]
    turned = apply_rope(down[:, None, c.rank :], cos, sin, interleaved=interleaved)
    cache = write_latents(context, cache, jnp.concatenate([latent, turned], axis=2), layout, batch)
    up = dense(w.up, x.dtype)
    keys = up[: heads * c.plain_dim].reshape(heads, c.plain_dim, c.rank)
    values = up[heads * c.plain_dim :].reshape(heads, c.value_dim, c.rank)
    plain = query[..., : c.plain_dim]
    turned_query = apply_rope(query[..., c.plain_dim :], cos, sin, interleaved=interleaved)

    def absorbed(rows: int, batch: StepBatch) -> jax.Array:
        asked = jnp.concatenate([_of_each_head("thn,hnr->thr", plain[:rows], keys), turned_query[:rows]], axis=2)
        seen = latent_attention(context, asked, cache, layout, batch, scale=scale, rank=c.rank)
        return _of_each_head("thr,hvr->thv", seen, values)

    def expanded(batch: StepBatch, chunks: AttentionBatch) -> jax.Array:
        made = linear(context, latent[:, 0], up)
        key = made[:, : heads * c.plain_dim].reshape(tokens, heads, c.plain_dim)
        key = jnp.concatenate([key, jnp.broadcast_to(turned, (tokens, heads, c.turned_dim))], axis=2)
        value = made[:, heads * c.plain_dim :].reshape(tokens, heads, c.value_dim)
        query = jnp.concatenate([plain, turned_query], axis=2)
        assert isinstance(cache, jax.Array)
        seen = chunk_attention(context, query, key, value, layout.window, chunks, stored=cache.dtype, scale=scale)
        rows = min(tokens, chunks.kv_lens.shape[0])
        singles = dataclasses.replace(batch, attention=single_tokens(chunks, rows))
        first = lax.cond(chunks.num_decodes > 0, lambda: absorbed(rows, singles), lambda: seen[:rows])
        is_single = (jnp.arange(rows, dtype=jnp.int32) < chunks.num_decodes)[:, None, None]
        return seen.at[:rows].set(jnp.where(is_single, first, seen[:rows]))

    chunks = batch.attention
    # of pages in 8 bits a step reads its own latents as rounded as every later one
    if isinstance(chunks, WholeSequences) or isinstance(cache, ScaledPages) or not _expands(context, chunks):
        seen = absorbed(tokens, batch)
    else:
        begin = begin_their_sequences(chunks)
        seen = lax.cond(begin, lambda: expanded(batch, chunks), lambda: absorbed(tokens, batch))
    return seen.reshape(tokens, -1), cache


def _expands(context: Context, batch: AttentionBatch) -> bool:
    """Whether a program also has attention of chunks by their heads' keys and values, for steps whose chunks have no
    context. Which of both a token gets then depends on the others of its step. Not on a GPU, whose host would wait for
    the choice in every layer.
    """
    return (
        context.backend.implementation == "xla"
        and context.backend.compute_capability is None
        and not batch.decode_only
        and batch.token_seq.shape[0] >= EXPANDED_TOKENS
    )


def _of_each_head(product: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of each head's numbers with its own matrix, accumulated in float32, in x's dtype."""

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(product, x, weight, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)

    def widened(x: jax.Array, weight: jax.Array) -> jax.Array:
        # XLA:CPU cannot multiply several bfloat16 matrices at once
        return multiply(x.astype(jnp.float32), weight.astype(jnp.float32))

    y = (
        lax.platform_dependent(x, weight, cpu=widened, default=multiply)
        if x.dtype == jnp.bfloat16
        else multiply(x, weight)
    )
    return y.astype(x.dtype)
