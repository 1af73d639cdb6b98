"""A matrix with adapters beside it (LoRA, arXiv:2106.09685): what `linear` gets in place of a weight, so that models
know nothing of adapters.

Each token has one of the adapters, by its slot in the stacks, or none. What several matrices are joined in has an A of
each, one below the other (`pallas_kernels.lora_matmul`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.backend import Backend
from pallas_kernels.lora_matmul.api import lora_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """``x @ base.T + (x @ a[slot].T) @ b[slot]``. Stacked on a first axis as the weights of layers are, or of one
    layer. S slots, r the highest rank, P matrices that are joined in base.
    """

    #: [L, out, in], however it is stored; None: the adapters by themselves
    base: Any = None
    a: Any  # [L, S, P * r, in]; or b, too, and the slots (`WholeAdapters`)
    b: Any  # [L, S, r, out], the scale in it
    #: i32 [L, T], the same for all layers; -1: no adapter. None: outside of a step
    slots: jax.Array | None = None
    #: out-features of each of the P matrices, on one device
    parts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeAdapters:
    """A and B of all layers, for a kernel that reads a layer's where they lie; without their base, as in `Adapted`.

    A scan over layers keeps them whole and says which layer is meant.
    """

    a: jax.Array  # [L, S, P * r, in]
    b: jax.Array  # [L, S, r, out]
    #: i32 [T]
    slots: jax.Array
    #: i32 [], of the stack; None: of all layers
    layer: jax.Array | None = None

    def of_layer(self, layer: jax.Array) -> WholeAdapters:
        return dataclasses.replace(self, layer=layer)


def adapter_term(backend: Backend, x: jax.Array, weight: Adapted) -> jax.Array:
    """What the adapters of one layer add, float32 [T, out], of x [T, in]; zeros where a token has none."""
    whole = weight.a
    if isinstance(whole, WholeAdapters):
        assert whole.layer is not None
        return lora_matmul(x, whole.a, whole.b, whole.slots, backend=backend, parts=weight.parts, layer=whole.layer)
    assert weight.slots is not None
    return lora_matmul(x, weight.a, weight.b, weight.slots, backend=backend, parts=weight.parts)
