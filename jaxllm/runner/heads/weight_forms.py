"""The weights as programs of a CPU take them: in several forms, all in the same memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.layers.mla import LATENT_MATRICES
from jaxllm.layers.stacked_matrix import StackedMatrix, can_be_read
from jaxllm.models.offloaded import lies_on_host
from jaxllm.models.params import MATRICES, Layers, Params
from pallas_kernels.backend import Backend
from pallas_kernels.dense_matmul.api import has_kernel as has_dense_kernel
from pallas_kernels.packed_matmul.api import has_kernel
from pallas_kernels.quant_matmul.cpu_ffi import kernel_for as int8_kernel_for
from pallas_kernels.quantized import Joined, Reordered, RoundedInputs, is_quantized
from pallas_kernels.storage import STORAGE

#: in which form a program takes the weights: as they are; with matrices that a single row reads where they lie; with
#: those that a few rows, or any number of them, read so by a kernel
Form = Literal["plain", "one row", "few rows", "several rows"]
PLAIN = Backend()


def with_whole_layers(params: Params, backend: Backend = PLAIN, *, one_row: bool = True) -> Params:
    """The weights as steps of one token take them on a CPU: `with_whole_segments`, and `with_head_for_one`.

    Args:
        params: arrays, or their shapes.
        one_row: False: as steps of several tokens do, which leave the head as it is.
    """
    params = with_whole_segments(params, backend, one_row=one_row)
    return with_head_for_one(params, backend) if one_row else params


def with_whole_segments(params: Params, backend: Backend = PLAIN, *, one_row: bool = True) -> Params:
    """The weights with the matrices of stacked layers as they lie (`layers.stacked_matrix`), in the same memory.

    Args:
        params: arrays, or their shapes.
        backend: whose kernels read some of them.
        one_row: False: no others.
    """

    def with_whole(weights: Any, names: tuple[str, ...]) -> Any:
        whole = {name: _whole(getattr(weights, name), backend, one_row) for name in names}
        return dataclasses.replace(weights, **whole)

    def of_segment(segment: Layers) -> Layers:
        if lies_on_host(segment):  # what is copied is a layer by itself
            return segment
        latents = None if segment.latents is None else with_whole(segment.latents, LATENT_MATRICES)
        return dataclasses.replace(with_whole(segment, MATRICES), latents=latents)

    draft = params.draft and with_whole_layers(params.draft, backend, one_row=one_row)
    return dataclasses.replace(params, layers=tuple(map(of_segment, params.layers)), draft=draft)


def with_head_for_one(params: Params, backend: Backend = PLAIN) -> Params:
    """The weights with a head that has one row multiplied by itself, where it is in bfloat16. A float32 row XLA:CPU
    multiplies by so tall a matrix as fast as it can be read (measured with 262,144 x 640: 44 ms; in parts, 138).

    Args:
        params: arrays, or their shapes.
    """
    head: Any = params.embedding if params.head is None else params.head
    if head is None or is_quantized(head) or has_dense_kernel(backend, head):
        return params
    if head.dtype != jnp.bfloat16 or not can_be_read(head):
        return params
    number: Any = jax.ShapeDtypeStruct((), np.int32, sharding=head.sharding)
    layer = number if isinstance(head, jax.ShapeDtypeStruct) else jax.device_put(np.int32(0), head.sharding)
    own: Any = StackedMatrix(_stored(head), layer, several=head)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(params, head=own)


def _whole(weight: Any, backend: Backend, one_row: bool) -> Any:
    """The matrices of stacked layers as they lie, where they can be read so; else as they are given."""
    if isinstance(weight, Joined):
        return Joined(tuple(_whole(part, backend, one_row) for part in weight.parts))
    if isinstance(weight, RoundedInputs) and len(weight.shape) == 3 and int8_kernel_for(backend.cpu_int8, weight):
        return StackedMatrix(weight)  # pyright: ignore[reportArgumentType]
    if isinstance(weight, RoundedInputs | Reordered):
        return dataclasses.replace(weight, weight=_whole(weight.weight, backend, one_row))
    if weight is None or len(weight.shape) != 3:
        return weight
    if has_dense_kernel(backend, weight) or has_kernel(backend, weight):
        return StackedMatrix(weight)
    if not one_row or not can_be_read(weight):
        return weight
    return StackedMatrix(weight if is_quantized(weight) else _stored(weight))


def _stored(weight: Any) -> Any:
    """`StackedMatrix.stored` of a weight [L, out, in], or [out, in]; of an array in the same memory, which is in use as
    long as either of them is.
    """
    shape, dtype = (1, *weight.shape)[-3:], np.dtype(STORAGE.get(weight.dtype, weight.dtype))
    if (weight.shape, weight.dtype) == (shape, dtype):
        return weight
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=weight.sharding)
    return jax.device_put(np.asarray(weight).view(dtype).reshape(shape), weight.sharding, may_alias=True)
