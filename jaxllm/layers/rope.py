"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context-extending variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import ValidationError


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim // 2], with the scaling that a Hugging Face config names.

    Types: "default", "linear" (position interpolation, arXiv:2306.15595), "llama3" (Llama 3.1's banded interpolation).
    Raises ValidationError for any other type.
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if (scaling or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValidationError("partial_rotary_factor is not supported: rotary embeddings turn whole heads")
    if scaling is None or kind == "default":
        return frequencies.astype(np.float32)
    if kind == "linear":
        return (frequencies / scaling["factor"]).astype(np.float32)
    if kind == "llama3":
        return _llama3(frequencies, scaling).astype(np.float32)
    raise ValidationError(f"rope scaling type {kind!r} is not supported; supported: default, linear, llama3")


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    rotations = context * frequencies / (2 * math.pi)  # turns over the original context
    blend = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def rope_tables(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, head_dim // 2], for positions int32 [T]; made once a step, not once a layer."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


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
