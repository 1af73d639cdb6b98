"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned by their positions."""

    #: half as many as numbers of a head turn, radians a position; zeros turn nothing
    inverse_frequencies: tuple[float, ...]
    #: of what is turned; scores of attention grow with its square
    scale: float = 1.0


def rope_tables(positions: jax.Array, kinds: tuple[Rotary, ...]) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [kinds, T, head_dim // 2], for positions int32 [T]; made once a step, not once a layer."""
    frequencies = jnp.asarray([kind.inverse_frequencies for kind in kinds], jnp.float32)
    angles = positions.astype(jnp.float32)[None, :, None] * frequencies[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if all(kind.scale == 1.0 for kind in kinds):
        return cos, sin
    scale = jnp.asarray([kind.scale for kind in kinds], jnp.float32)[:, None, None]
    return cos * scale, sin * scale


def sectioned_rope_tables(
    positions: jax.Array, kinds: tuple[Rotary, ...], sections: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """`rope_tables` for positions int32 [3, T] of three axes, of which each turns a section of the numbers (Qwen2-VL,
    arXiv:2409.12191, section 2.1).

    Args:
        sections: static; the frequencies of each axis, head_dim // 2 in all.
    """
    own = [rope_tables(axis, kinds) for axis in positions]
    stops = list(itertools.accumulate(sections, initial=0))

    def joined(tables: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([t[..., a:b] for t, (a, b) in zip(tables, itertools.pairwise(stops), strict=True)], -1)

    return joined([cos for cos, _ in own]), joined([sin for _, sin in own])


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first 2 r numbers of each head of x [T, heads, head_dim] by cos, sin [T, r]; the others stay.

    Args:
        interleaved: neighbours are paired; otherwise a number of the first r and one of the second, as in most of
            Hugging Face's models.
    """
    width = 2 * cos.shape[-1]
    turning = x[..., :width].astype(jnp.float32)
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else jnp.split(turning, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = first * cos - second * sin, second * cos + first * sin
    joined = jnp.stack(turned, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    joined = joined.astype(x.dtype)
    return joined if width == x.shape[-1] else jnp.concatenate([joined, x[..., width:]], axis=-1)
