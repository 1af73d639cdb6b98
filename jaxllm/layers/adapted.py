"""A matrix with adapters beside it (LoRA, arXiv:2106.09685): what `linear` gets in place of a weight, so that models
know nothing of adapters.

Each token has one of the adapters, by its slot in the stacks, or none. What several matrices are joined in has the
parts' ranks one behind the other: A's rows are the parts', and B is zero where a row of one part meets a rank of
another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """``x @ base.T + (x @ a[slot].T) @ b[slot].T``. Stacked on a first axis as the weights of layers are, or of one
    layer. S slots, R ranks of all parts.
    """

    #: [L, out, in], however it is stored
    base: Any
    a: jax.Array  # [L, S, R, in]
    b: jax.Array  # [L, S, out, R], the scale in it
    #: i32 [L, T], the same for all layers; -1: no adapter. None: outside of a step
    slots: jax.Array | None = None


def with_slots(params: Tree, slots: jax.Array) -> Tree:
    """Weights whose adapted matrices know each token's slot, i32 [T]."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Adapted):
            return leaf
        return dataclasses.replace(leaf, slots=jnp.broadcast_to(slots, (leaf.a.shape[0], *slots.shape)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def adapter_term(x: jax.Array, weight: Adapted) -> jax.Array:
    """What the adapters of one layer add, float32 [T, out], of x [T, in]; zeros where a token has none."""
    assert weight.slots is not None
    slots, ranks, _ = weight.a.shape
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    low = jnp.einsum("ti,sri->tsr", x, weight.a, precision=precision, preferred_element_type=jnp.float32)
    own = weight.slots[:, None] == jnp.arange(slots, dtype=jnp.int32)
    low = jnp.where(own[..., None], low, 0).astype(x.dtype)
    return jnp.einsum("tsr,sor->to", low, weight.b, precision=precision, preferred_element_type=jnp.float32)
