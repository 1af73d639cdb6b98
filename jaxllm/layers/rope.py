"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned by their positions."""

    #: [head_dim // 2], radians a position
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


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [T, heads, head_dim] by cos, sin [T, head_dim // 2]; halves are paired as in Hugging Face's models."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
