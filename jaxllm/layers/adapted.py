"""A matrix with adapters beside it (LoRA, arXiv:2106.09685): what `linear` gets in place of a weight, so that models
know nothing of adapters.

Each token has one of the adapters, by its slot in the stacks, or none. What several matrices are joined in has an A of
each, one below the other (`pallas_kernels.lora_matmul`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.lora_matmul.api import lora_matmul

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """``x @ base.T + (x @ a[slot].T) @ b[slot].T``. Stacked on a first axis as the weights of layers are, or of one
    layer. S slots, r the highest rank, P matrices that are joined in base.
    """

    #: [L, out, in], however it is stored; None: the adapters by themselves
    base: Any = None
    a: Any  # [L, S, P * r, in]
    b: Any  # [L, S, out, r], the scale in it
    #: i32 [L, T], the same for all layers; -1: no adapter. None: outside of a step
    slots: jax.Array | None = None
    #: out-features of each of the P matrices, on one device
    parts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def with_slots(params: Tree, slots: jax.Array) -> Tree:
    """Weights whose adapted matrices know each token's slot, i32 [T]."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Adapted):
            return leaf
        return dataclasses.replace(leaf, slots=jnp.broadcast_to(slots, (leaf.a.shape[0], *slots.shape)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def adapter_term(backend: Backend, x: jax.Array, weight: Adapted) -> jax.Array:
    """What the adapters of one layer add, float32 [T, out], of x [T, in]; zeros where a token has none."""
    assert weight.slots is not None
    return lora_matmul(x, weight.a, weight.b, weight.slots, backend=backend, parts=weight.parts)
