"""A matrix with adapters beside it (LoRA, arXiv:2106.09685): what `linear` gets in place of a weight, so that models
know nothing of adapters.

Each token has one of the adapters, by its slot in the stacks, or none. Where several matrices are joined, A has the
parts' ranks one behind the other, and B each part's own beside its rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """``x @ base.T + (x @ a[slot].T) @ b[slot].T``. Stacked on a first axis as the weights of layers are, or of one
    layer. S slots of rank r, P parts.
    """

    #: [L, out, in], however it is stored
    base: Any
    a: jax.Array  # [L, S, P * r, in]
    b: jax.Array  # [L, S, out, r], the scale in it
    #: i32 [L, T], the same for all layers; -1: no adapter. None: outside of a step
    slots: jax.Array | None = None
    #: out-features of each of the P matrices that are joined (`lora_matmul`)
    parts: tuple[int, ...] = dataclasses.field(kw_only=True, metadata={"static": True})


def with_slots(params: Tree, slots: jax.Array) -> Tree:
    """Weights whose adapted matrices know each token's slot, i32 [T]."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Adapted):
            return leaf
        return dataclasses.replace(leaf, slots=jnp.broadcast_to(slots, (leaf.a.shape[0], *slots.shape)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
