"""Weights in the blocks of a GGUF file, as ggml has them (``ggml-common.h``): runs along K of 32 or 256 numbers.

Each function states its block's fields in the order of their bytes. d and m are float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import power_of_two

#: IQ4_NL's and IQ4_XS's sixteen numbers, and MXFP4's, doubled
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWeight:
    """A weight [N, K] (`pallas_kernels.quantized`) as a file has it."""

    #: uint8 [..., N, K / block * bytes of a block]
    data: jax.Array
    #: a name of `BLOCKS`
    kind: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        block, nbytes, _ = BLOCKS[self.kind]
        *rest, width = self.data.shape
        return (*rest, width // nbytes * block)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        _, nbytes, unpack = BLOCKS[self.kind]
        blocks = self.data.reshape(*self.data.shape[:-1], -1, nbytes)
        return unpack(blocks).reshape(self.shape).astype(dtype)


def _half(b: jax.Array, start: int) -> jax.Array:
    """The float16 at byte ``start`` of every block, float32 [..., 1]."""
    return lax.bitcast_convert_type(b[..., start : start + 2], jnp.float16).astype(jnp.float32)[..., None]


def _signed(b: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(b, jnp.int8).astype(jnp.float32)


def _nibbles(packed: jax.Array) -> jax.Array:
    """uint8 [..., k] -> [..., 2k]: all low nibbles, then all high ones."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: jax.Array) -> jax.Array:
    """uint8 [..., 4], a little-endian word -> its 32 bits from the lowest."""
    bits = (packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1)


def _shifted(packed: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """uint8 [..., k] -> [..., len(shifts), k]: the ``mask`` bits after each shift."""
    return (packed[..., None, :] >> jnp.asarray(shifts, jnp.uint8)[:, None]) & jnp.uint8(mask)


def _cut(x: jax.Array, *shape: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], *shape)


def _flat(x: jax.Array, axes: int) -> jax.Array:
    return x.reshape(*x.shape[:-axes], -1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _q4_0(b: jax.Array) -> jax.Array:
    """d, qs[16]: ``d * (q - 8)``."""
    return _half(b, 0) * (_wide(_nibbles(b[..., 2:])) - 8)


def _q4_1(b: jax.Array) -> jax.Array:
    """d, m, qs[16]: ``d * q + m``."""
    return _half(b, 0) * _wide(_nibbles(b[..., 4:])) + _half(b, 2)


def _q5_0(b: jax.Array) -> jax.Array:
    """d, qh[4] (fifth bits), qs[16]: ``d * (q - 16)``."""
    q = _nibbles(b[..., 6:]) | (_bits(b[..., 2:6]) << 4)
    return _half(b, 0) * (_wide(q) - 16)


def _q5_1(b: jax.Array) -> jax.Array:
    """d, m, qh[4], qs[16]: ``d * q + m``."""
    q = _nibbles(b[..., 8:]) | (_bits(b[..., 4:8]) << 4)
    return _half(b, 0) * _wide(q) + _half(b, 2)


def _q8_0(b: jax.Array) -> jax.Array:
    """d, qs int8[32]: ``d * q``."""
    return _half(b, 0) * _signed(b[..., 2:])


def _q2_k(b: jax.Array) -> jax.Array:
    """scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin; 16 runs of 16. Each half of 128 values is 32
    bytes, whose pairs of bits hold values 0-31, 32-63, 64-95 and 96-127.
    """
    scale = _half(b, 80) * _wide(b[..., :16] & 15)
    minimum = _half(b, 82) * _wide(b[..., :16] >> 4)
    q = _cut(_flat(_shifted(_cut(b[..., 16:80], 2, 32), (0, 2, 4, 6), 3), 3), 16, 16)
    return _flat(scale[..., None] * _wide(q) - minimum[..., None], 2)


def _q3_k(b: jax.Array) -> jax.Array:
    """hmask[32] (third bits), qs[64], scales[12] (16 of six bits, 32 too large), d; 16 runs of 16. A value is its two
    low bits, minus 4 where its hmask bit is clear. Scale i: the low nibble i of bytes 0-7 (all low ones, then all high
    ones), its upper two bits in byte ``8 + i % 4`` at ``2 * (i // 4)``.
    """
    packed = b[..., 96:108]
    upper = _flat(_shifted(packed[..., 8:], (0, 2, 4, 6), 3), 2)
    scale = _wide(_nibbles(packed[..., :8]) | (upper << 4)) - 32
    low = _shifted(_cut(b[..., 32:96], 2, 32), (0, 2, 4, 6), 3)
    high = _cut(_flat(_shifted(b[..., :32], tuple(range(8)), 1), 2), 2, 4, 32)
    q = _cut(_flat(_wide(low | (high << 2)) - 4, 3), 16, 16)
    return _flat((_half(b, 108) * scale)[..., None] * q, 2)


def _affine_k(b: jax.Array, q: jax.Array) -> jax.Array:
    """``d * scale * q - dmin * minimum`` of eight runs of 32. The first four scales and minima are the low six bits of
    bytes 0-3 and 4-7; the last four have a nibble of bytes 8-11 (low: scale, high: minimum), and their upper two bits
    from the top of bytes 0-3 and 4-7.
    """
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = jnp.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    minimum = jnp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    scale, minimum = _half(b, 0) * _wide(scale), _half(b, 2) * _wide(minimum)
    return _flat(scale[..., None] * _wide(_cut(q, 8, 32)) - minimum[..., None], 2)


def _q4_k(b: jax.Array) -> jax.Array:
    """d, dmin, scales[12], qs[128]; each 32 bytes hold a run in low and one in high nibbles."""
    return _affine_k(b, _flat(_shifted(_cut(b[..., 16:], 4, 32), (0, 4), 15), 3))


def _q5_k(b: jax.Array) -> jax.Array:
    """d, dmin, scales[12], qh[32], qs[128]; bit i of qh is the fifth bit of run i."""
    low = _flat(_shifted(_cut(b[..., 48:], 4, 32), (0, 4), 15), 3)
    high = _flat(_shifted(b[..., 16:48], tuple(range(8)), 1), 2)
    return _affine_k(b, low | (high << 4))


def _q6_k(b: jax.Array) -> jax.Array:
    """ql[128], qh[64], scales int8[16], d; 16 runs of 16, ``d * scale * (q - 32)``. Each half of 128 values: 64 bytes
    of ql (low nibbles values 0-63, high ones 64-127) and 32 of qh, whose pairs of bits are the upper ones of values
    0-31, 32-63, 64-95 and 96-127.
    """
    low = _cut(_flat(_shifted(_cut(b[..., :128], 2, 64), (0, 4), 15), 3), 2, 4, 32)
    high = _shifted(_cut(b[..., 128:192], 2, 32), (0, 2, 4, 6), 3)
    q = _cut(_flat(_wide(low | (high << 4)) - 32, 3), 16, 16)
    return _flat((_half(b, 208) * _signed(b[..., 192:208]))[..., None] * q, 2)


def _of_table(table: tuple[int, ...], codes: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[codes]


def _iq4_nl(b: jax.Array) -> jax.Array:
    """d, qs[16]: ``d * table[q]``."""
    return _half(b, 0) * _of_table(IQ4_TABLE, _nibbles(b[..., 2:]))


def _iq4_xs(b: jax.Array) -> jax.Array:
    """d, scales_h (two bytes, two bits of each scale), scales_l[4] (a nibble of each), qs[128]; eight runs of 32,
    ``d * (scale - 32) * table[q]``.
    """
    low = _flat(jnp.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1), 2)
    high = _flat((b[..., 2:4, None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8)) & 3, 2)
    scale = _wide(low | (high << 4)) - 32
    values = _of_table(IQ4_TABLE, _flat(_shifted(_cut(b[..., 8:], 8, 16), (0, 4), 15), 3))
    return _flat((_half(b, 0) * scale)[..., None] * _cut(values, 8, 32), 2)


def _mxfp4(b: jax.Array) -> jax.Array:
    """e, qs[16]: ``2 ** (e - 128) * table[q]``, of a table that is doubled."""
    return 0.5 * power_of_two(b[..., :1]) * _of_table(E2M1_DOUBLED, _nibbles(b[..., 1:]))


#: by ggml's name: numbers of a block, its bytes, and uint8 [..., bytes] -> float32 [..., numbers]
BLOCKS: dict[str, tuple[int, int, Callable[[jax.Array], jax.Array]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
    "IQ4_NL": (32, 18, _iq4_nl),
    "IQ4_XS": (256, 136, _iq4_xs),
    "MXFP4": (32, 17, _mxfp4),
}
