"""How weights of four bits lie in memory: one layout, into which AWQ's and GPTQ's convert without loss.

A weight [N, K] ([out, in], as `linear` has it) is cut along K into groups of g elements. Element k of row n is

    w[n, k] = (q[n, k] - zeros[k // g, n]) * scales[k // g, n],    q in 0..15

- ``packed``, uint8 [N, K / 2]: a group's g / 2 bytes lie together, and byte j of them holds the group's element j in
  its low four bits and element j + g / 2 in its high four. So the low halves of a run of bytes are a run of elements,
  and so are the high halves: a kernel multiplies each with its half of x as it is, and shuffles nothing.
- ``scales``, floating [K / g, N], and ``zeros``, uint8 [K / g, N]: group-major, so that the scales of neighbouring rows
  are neighbours (a kernel takes many rows of one group at a time) and as AWQ and GPTQ store theirs. A symmetric
  quantization has zeros of 8. GPTQ's can reach 16.

Worked example: one row, K = 8, g = 4, q = [1, 2, 3, 4, 15, 0, 8, 7]:

    group 0: elements 1 2 | 3 4    bytes 0x31 0x42    (3 above 1, 4 above 2)
    group 1: elements 15 0 | 8 7   bytes 0x8f 0x70
    packed = [[0x31, 0x42, 0x8f, 0x70]]
    scales = [[0.5], [2.0]], zeros = [[8], [8]]
    w = [[-3.5, -3.0, -2.5, -2.0, 14.0, -16.0, 0.0, -2.0]]
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """A weight [N, K] in groups of four-bit integers (see the module's docstring). A pytree; every array may have
    further dimensions in front, the same for all three: a stack of layers."""

    #: uint8 [..., N, K / 2]
    packed: jax.Array
    #: bf16, f16 or f32 [..., K / g, N]
    scales: jax.Array
    #: uint8 [..., K / g, N], 0..16
    zeros: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, K): the weight's own."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    @property
    def group_size(self) -> int:
        """g: elements of K that share a scale."""
        return self.packed.shape[-1] * 2 // self.scales.shape[-2]

    def at(self, layer: jax.Array) -> Int4Weight:
        """One layer of a stack."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), self)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """`dequantize`, as every quantized weight has it."""
        return dequantize(self, dtype)


def int4_weight(packed: jax.Array, scales: jax.Array, zeros: jax.Array) -> Int4Weight:
    """An `Int4Weight` of arrays that fit together.

    Raises ValueError where shapes or dtypes do not.
    """
    for name, array in (("packed", packed), ("zeros", zeros)):
        if array.dtype != jnp.uint8:
            raise ValueError(f"{name} must be uint8, got {array.dtype}")
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise ValueError(f"scales must be of a floating type, got {scales.dtype}")
    if scales.shape != zeros.shape:
        raise ValueError(f"scales and zeros must have one shape, got {scales.shape} and {zeros.shape}")
    *stack, n, half = packed.shape
    groups = scales.shape[-2] if scales.ndim == packed.ndim else 0
    if scales.shape != (*stack, groups, n) or not groups or half % groups:
        raise ValueError(
            f"packed {packed.shape} [..., N, K / 2] needs scales [..., K / g, N] with groups of an even number of "
            f"elements g that divides K, got {scales.shape}"
        )
    return Int4Weight(packed=packed, scales=scales, zeros=zeros)


def pack(q: jax.Array, group_size: int) -> jax.Array:
    """Integers 0..15 [..., N, K] to bytes [..., N, K / 2].

    Raises ValueError where ``group_size`` is odd or does not divide K.
    """
    *rest, k = q.shape
    if group_size < 2 or group_size % 2 or k % group_size:
        raise ValueError(f"group_size must be even and divide K = {k}, got {group_size}")
    halves = q.astype(jnp.uint8).reshape(*rest, k // group_size, 2, group_size // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*rest, k // 2)


def unpack(packed: jax.Array, group_size: int) -> jax.Array:
    """`pack` backwards: uint8 0..15 [..., N, K]."""
    *rest, half = packed.shape
    groups = packed.reshape(*rest, 2 * half // group_size, group_size // 2)
    return jnp.stack([groups & 15, groups >> 4], axis=-2).reshape(*rest, 2 * half)


def dequantize(weight: Int4Weight, dtype: jnp.dtype) -> jax.Array:
    """The weight itself, [..., N, K], computed in float32 and rounded once to ``dtype``."""
    *rest, k = weight.shape
    q = unpack(weight.packed, weight.group_size).reshape(*rest, -1, weight.group_size)
    scales, zeros = (jnp.swapaxes(per_group, -1, -2)[..., None] for per_group in (weight.scales, weight.zeros))
    # the difference of two small integers is exact in any floating type
    centred = q.astype(jnp.float32) - zeros.astype(jnp.float32)
    return (centred * scales.astype(jnp.float32)).reshape(*rest, k).astype(dtype)


def halves(weight: Int4Weight, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """A weight [N, K] as two matrices [N, K / 2]: the low halves of all groups, and the high ones."""
    n, k = weight.shape
    packed = weight.packed.reshape(n, -1, weight.group_size // 2)
    scales, zeros = (per_group.T[:, :, None].astype(jnp.float32) for per_group in (weight.scales, weight.zeros))

    def matrix(codes: jax.Array) -> jax.Array:
        return ((codes.astype(jnp.float32) - zeros) * scales).astype(dtype).reshape(n, k // 2)

    return matrix(packed & 15), matrix(packed >> 4)
