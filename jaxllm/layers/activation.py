"""Activation functions, by the names that Hugging Face's configs have for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    # other names of the tanh form
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # Primer's squared ReLU (So et al. 2021, arXiv:2109.08668)
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    # CLIP's
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

#: those that a gated product has a kernel for (`pallas_kernels.dense_matmul`), by its names
ONE_PASS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu"}

#: of GPT-OSS, which only has it with a gate: its slope and its bounds
CLAMPED, CLAMPED_SLOPE, CLAMPED_AT = "clamped swiglu", 1.702, 7.0


#: of Apertus, which only has it without a gate: it has numbers of its own (`xielu`)
XIELU = "xielu"


def xielu(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """x [...] in its dtype, of numbers [4]: alphas of positive and of negative x, before their softplus, the slope at
    0, and the largest x whose exponential is taken (Huang and Schlag 2024, arXiv:2411.13010).
    """
    wide = x.astype(jnp.float32)
    positive, negative, slope, largest = numbers.astype(jnp.float32)
    above = jax.nn.softplus(positive) * wide * wide
    below = (jnp.expm1(jnp.minimum(wide, largest)) - wide) * (slope + jax.nn.softplus(negative))
    return (jnp.where(wide > 0, above, below) + slope * wide).astype(x.dtype)


def activate(name: str, x: jax.Array) -> jax.Array:
    """x [...] in its dtype. Computed in float32 and rounded once, as torch does: XLA rounds after each operation."""
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


def gated(name: str, gate_up: jax.Array) -> jax.Array:
    """The activation of the first half times the second: [..., 2F] -> [..., F], rounded once (Shazeer 2020,
    arXiv:2002.05202). `CLAMPED` bounds the gate above, the second half on both sides, and adds one to that.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    if name == CLAMPED:
        gate, up = jnp.minimum(gate, CLAMPED_AT), jnp.clip(up, -CLAMPED_AT, CLAMPED_AT)
        return ((up + 1) * (gate * jax.nn.sigmoid(gate * CLAMPED_SLOPE))).astype(gate_up.dtype)
    return (ACTIVATIONS[name](gate) * up).astype(gate_up.dtype)
