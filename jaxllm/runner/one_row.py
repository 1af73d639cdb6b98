"""The weights as programs take them that may multiply a single row on a CPU (`layers.stacked_matrix`): beside the
model's own params, in the same memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxllm.layers.stacked_matrix import StackedMatrix, can_be_read
from jaxllm.models.decoder import Params


def with_whole_layers(params: Params) -> Params:
    """With the matrices of stacked layers as they lie, and `with_head_for_one`: for steps of one token.

    Args:
        params: arrays, or their shapes.
    """
    layers = jax.tree.map(lambda w: StackedMatrix(_bits(w)) if w.ndim == 3 and can_be_read(w) else w, params.layers)
    return with_head_for_one(dataclasses.replace(params, layers=layers))


def with_head_for_one(params: Params) -> Params:
    """With a head that has one row multiplied by itself.

    Args:
        params: arrays, or their shapes.
    """
    head: Any = params.embedding if params.head is None else params.head
    if not can_be_read(head):
        return params
    number: Any = jax.ShapeDtypeStruct((), np.int32, sharding=head.sharding)
    layer = number if isinstance(head, jax.ShapeDtypeStruct) else jax.device_put(np.int32(0), head.sharding)
    own: Any = StackedMatrix(_bits(head), layer, several=head)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(params, head=own)


def _bits(weight: Any) -> Any:
    """uint16 [L, out, in] of a bfloat16 weight [L, out, in], or [out, in]; of an array in the same memory, which is in
    use as long as either of them is.
    """
    shape = (1, *weight.shape)[-3:]
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, np.uint16, sharding=weight.sharding)
    return jax.device_put(np.asarray(weight).view(np.uint16).reshape(shape), weight.sharding, may_alias=True)
