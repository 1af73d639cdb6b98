"""Chunks of prompts that see themselves alone, in latent attention: by keys and values of each head, as its formula."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.attention import Cache, Layout
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.mla import EXPANDED_TOKENS, LatentConfig, LatentWeights, latent_branch
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
from pallas_kernels.batch import AttentionBatch

CONFIG = LatentConfig(query_rank=None, rank=16, plain_dim=12, turned_dim=4, value_dim=8)
HEADS, HIDDEN, SCALE, EPS = 3, 24, 0.25, 1e-6
SEQS, WIDTH, BLOCK = 4, 12, 64
#: (tokens in the cache, new tokens) of each sequence
BEGINNING = ((70, 1), (0, 200), (0, 65), (0, 130))
GOING_ON = ((70, 1), (0, 200), (64, 65), (0, 130))


@functools.cache
def weights() -> Any:
    """`LatentWeights` in numpy."""
    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return (draw.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)

    c = CONFIG
    return LatentWeights(
        down=matrix(c.width, HIDDEN),
        query_norm=None,
        query_up=matrix(HEADS * c.query_dim, HIDDEN),
        norm=1 + 0.1 * matrix(c.rank),
        up=matrix(HEADS * (c.plain_dim + c.value_dim), c.rank),
    )


def formula(x: np.ndarray) -> np.ndarray:
    """What the heads see of one whole sequence [T, d], in float64, with every head's keys and values. Nothing is
    turned, as at angles of zero.
    """
    c, w = CONFIG, jax.tree.map(lambda array: np.asarray(array, np.float64), weights())
    down, query = x @ w.down.T, (x @ w.query_up.T).reshape(len(x), HEADS, c.query_dim)
    latent = down[:, : c.rank]
    latent = latent / np.sqrt(np.mean(latent**2, axis=1, keepdims=True) + EPS) * w.norm
    keys = (latent @ w.up[: HEADS * c.plain_dim].T).reshape(len(x), HEADS, c.plain_dim)
    values = (latent @ w.up[HEADS * c.plain_dim :].T).reshape(len(x), HEADS, c.value_dim)
    scores = np.einsum("thn,chn->htc", query[..., : c.plain_dim], keys)
    scores += np.einsum("thn,cn->htc", query[..., c.plain_dim :], down[:, c.rank :])
    scores = np.where(np.tri(len(x), dtype=bool), SCALE * scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htc,chv->thv", share / share.sum(axis=-1, keepdims=True), values).reshape(len(x), -1)


@functools.cache
def layer(tokens: int) -> jax.stages.Wrapped:
    def step(x: jax.Array, cache: Cache, batch: AttentionBatch) -> tuple[jax.Array, Cache]:
        nothing = jnp.int32(0)
        place = Layout(group=nothing, page_offset=nothing, window=jnp.int32(2**30))
        angles = jnp.zeros((tokens, CONFIG.turned_dim // 2))
        return latent_branch(
            Context(),
            CONFIG,
            jax.tree.map(jnp.asarray, weights()),
            place,
            jnp.cos(angles),
            jnp.sin(angles),
            x,
            cache,
            StepBatch(tokens=jnp.zeros(tokens, jnp.int32), attention=batch),
            scale=SCALE,
            interleaved=False,
        )

    return jax.jit(step, compiler_options=CPU_OPTIONS)


def packed(work: tuple[tuple[int, int], ...], tokens: int) -> AttentionBatch:
    counts = [new for _, new in work]
    start = np.cumsum([0, *counts])
    total = start[-1]
    seq, positions = np.zeros((2, tokens), np.int32)
    seq[:total] = np.repeat(np.arange(len(work)), counts)
    positions[:total] = np.concatenate([np.arange(had, had + new) for had, new in work])
    return AttentionBatch(
        token_seq=jnp.asarray(seq),
        positions=jnp.asarray(positions),
        token_valid=jnp.arange(tokens) < total,
        query_start=jnp.asarray(np.pad(start, (0, SEQS + 1 - len(start)), mode="edge"), jnp.int32),
        kv_lens=jnp.asarray(np.pad([sum(each) for each in work], (0, SEQS - len(work))), jnp.int32),
        block_tables=1 + jnp.arange(SEQS * WIDTH, dtype=jnp.int32).reshape(1, SEQS, WIDTH),
        num_decodes=jnp.int32(sum(new == 1 for new in counts)),
        num_seqs=jnp.int32(len(work)),
    )


@pytest.mark.parametrize("work", [BEGINNING, GOING_ON, BEGINNING[:1]], ids=["beginning", "going on", "single"])
def test_heads_see_what_the_formula_says(work: tuple[tuple[int, int], ...]):
    """Whether keys and values are made or not; pages that nobody wrote are NaN."""
    draw = np.random.default_rng(1)
    sequences = [draw.normal(size=(had + new, HIDDEN)) for had, new in work]
    cache = jnp.full((1 + SEQS * WIDTH, BLOCK, CONFIG.width), jnp.nan, jnp.float32)
    step = layer(EXPANDED_TOKENS)
    before = tuple((0, had) for had, _ in work)
    for part, begins in ((before, True), (work, False)):
        rows = [x[:new] if begins else x[had:] for x, (had, new) in zip(sequences, part, strict=True)]
        x = np.concatenate(rows)
        x = jnp.asarray(np.pad(x, ((0, EXPANDED_TOKENS - len(x)), (0, 0))), jnp.float32)
        seen, cache = step(x, cache, packed(part, EXPANDED_TOKENS))
    expected = np.concatenate([formula(x)[had:] for x, (had, _) in zip(sequences, work, strict=True)])
    assert np.abs(np.asarray(seen)[: len(expected)] - expected).max() < 1e-5


def test_which_programs_make_keys_and_values():
    """None of a few tokens."""

    def makes(tokens: int) -> bool:
        arguments = jnp.zeros((tokens, HIDDEN)), jnp.zeros((1 + SEQS * WIDTH, BLOCK, CONFIG.width))
        text = str(layer(tokens).trace(*arguments, packed(BEGINNING[:1], tokens)).jaxpr)
        return f"f32[{tokens},{HEADS * (CONFIG.plain_dim + CONFIG.value_dim)}]" in text

    assert makes(EXPANDED_TOKENS) and not makes(EXPANDED_TOKENS // 2)
