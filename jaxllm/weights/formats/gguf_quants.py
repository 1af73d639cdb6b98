"""GGUF blocks are dequantised to float32, many blocks at a time.

A quantised tensor is a run of fixed-size blocks along its last axis. The layouts are those of ggml
(``ggml-common.h``): every function below states its block's fields in file order. Scales are float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray

# Dequantisation widens a byte to many float32 temporaries. So many values at a time keep them in a core's cache, and in
# memory that the process has already (measured on SmolLM2, Q4_1: half the time of 4M values).
_VALUES_PER_CHUNK = 1 << 17


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """How one GGUF tensor type is stored.

    ``block`` values take ``nbytes`` bytes. ``dtype`` is what ``read`` returns for it: the stored dtype of a float
    type, float32 for a quantised one. ``unpack`` maps uint8 ``(n, nbytes)`` to float32 ``(n, block)``.
    """

    name: str
    block: int
    nbytes: int
    dtype: np.dtype
    unpack: Callable[[Array], Array] | None = None
    #: which `unpack` needs
    package: str | None = None


def _half(blocks: Array, start: int) -> Array:
    """Return the float16 at byte ``start`` of every block, as float32 of shape ``(n, 1)``."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """uint8 ``(n, k)`` -> ``(n, 2 * k)``: all low nibbles, then all high nibbles."""
    packed = np.ascontiguousarray(packed)
    n, k = packed.shape
    both = np.empty((n, 2 * k), np.uint8)
    np.bitwise_and(packed, 15, out=both[:, :k])
    np.right_shift(packed, 4, out=both[:, k:])
    return both


def _affine(q: Array, scale: Array, offset: Array) -> Array:
    """float32 ``scale * q + offset``, in one new array."""
    values = q.astype(np.float32)
    values *= scale
    values += offset
    return values


def _bits(packed: Array) -> Array:
    """uint8 ``(n, 4)``, a little-endian word -> its 32 bits from the lowest, ``(n, 32)``."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _shifted(packed: Array, shifts: tuple[int, ...], mask: int) -> Array:
    """uint8 ``(n, g, k)`` -> ``(n, g, len(shifts), k)``: the ``mask`` bits after each shift."""
    return (packed[:, :, None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _q4_0(b: Array) -> Array:
    """d f16, qs[16]: ``d * (q - 8)``."""
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Array) -> Array:
    """d f16, m f16, qs[16]: ``d * q + m``."""
    return _affine(_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2))


def _q5_0(b: Array) -> Array:
    """d f16, qh[4] (fifth bits), qs[16]: ``d * (q - 16)``."""
    q = _nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)
    return _half(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Array) -> Array:
    """d f16, m f16, qh[4], qs[16]: ``d * q + m``."""
    q = _nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)
    return _affine(q, _half(b, 0), _half(b, 2))


def _q8_0(b: Array) -> Array:
    """d f16, qs int8[32]: ``d * q``."""
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(b: Array) -> Array:
    """scales[16] (low nibble scale, high nibble min), qs[64], d f16, dmin f16; 16 sub-blocks of 16.

    Each half of 128 values is 32 bytes: bit pairs 0, 2, 4, 6 hold values 0-31, 32-63, 64-95, 96-127.
    """
    n = len(b)
    scale = (_half(b, 80) * (b[:, :16] & 15).astype(np.float32))[:, :, None]
    minimum = (_half(b, 82) * (b[:, :16] >> 4).astype(np.float32))[:, :, None]
    q = _shifted(b[:, 16:80].reshape(n, 2, 32), (0, 2, 4, 6), 3).reshape(n, 16, 16)
    return (scale * q.astype(np.float32) - minimum).reshape(n, 256)


def _q3_k(b: Array) -> Array:
    """hmask[32] (third bits), qs[64], scales[12] (16 of 6 bits, biased by 32), d f16; 16 sub-blocks of 16.

    A value is its two low bits minus 4 where its hmask bit is clear. Scale i: low nibble i of bytes 0-7 (all low
    nibbles, then all high ones), upper two bits in byte ``8 + i % 4`` at ``2 * (i // 4)``.
    """
    n = len(b)
    packed = b[:, 96:108]
    upper = _shifted(packed[:, None, 8:], (0, 2, 4, 6), 3).reshape(n, 16)
    scale = (_nibbles(packed[:, :8]) | (upper << 4)).astype(np.int8) - np.int8(32)
    low = _shifted(b[:, 32:96].reshape(n, 2, 32), (0, 2, 4, 6), 3)
    high = _shifted(b[:, None, :32], tuple(range(8)), 1).reshape(n, 2, 4, 32)
    q = (low | (high << 2)).astype(np.int8) - np.int8(4)
    scaled = (_half(b, 108) * scale.astype(np.float32))[:, :, None]
    return (scaled * q.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


def _scales_and_minima(packed: Array) -> tuple[Array, Array]:
    """scales[12] of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit minima, float32 ``(n, 8)`` each.

    The first four of each are the low six bits of bytes 0-3 and 4-7. The last four take a nibble of bytes 8-11
    (low: scale, high: minimum) and their upper two bits from the top of bytes 0-3 and 4-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _affine_k(b: Array, q: Array) -> Array:
    """``d * scale * q - dmin * minimum`` for the eight sub-blocks of 32 of a Q4_K or Q5_K block."""
    scale, minimum = _scales_and_minima(b[:, 4:16])
    scale, minimum = _half(b, 0) * scale, _half(b, 2) * minimum
    return (scale[:, :, None] * q.reshape(len(b), 8, 32).astype(np.float32) - minimum[:, :, None]).reshape(len(b), 256)


def _q4_k(b: Array) -> Array:
    """d f16, dmin f16, scales[12], qs[128]; each 32 bytes hold a sub-block in low and one in high nibbles."""
    return _affine_k(b, _shifted(b[:, 16:].reshape(len(b), 4, 32), (0, 4), 15))


def _q5_k(b: Array) -> Array:
    """d f16, dmin f16, scales[12], qh[32], qs[128]; bit i of qh is the fifth bit of sub-block i."""
    n = len(b)
    low = _shifted(b[:, 48:].reshape(n, 4, 32), (0, 4), 15).reshape(n, 8, 32)
    high = _shifted(b[:, None, 16:48], tuple(range(8)), 1).reshape(n, 8, 32)
    return _affine_k(b, low | (high << 4))


def _q6_k(b: Array) -> Array:
    """ql[128], qh[64], scales int8[16], d f16; 16 sub-blocks of 16, ``d * scale * (q - 32)``.

    Each half of 128 values: 64 ql bytes (low nibbles values 0-63, high ones 64-127) and 32 qh bytes whose bit
    pairs 0, 2, 4, 6 are the upper bits of values 0-31, 32-63, 64-95, 96-127.
    """
    n = len(b)
    low = _shifted(b[:, :128].reshape(n, 2, 64), (0, 4), 15).reshape(n, 2, 4, 32)
    high = _shifted(b[:, 128:192].reshape(n, 2, 32), (0, 2, 4, 6), 3)
    q = (low | (high << 4)).astype(np.int8) - np.int8(32)
    scale = (_half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32))[:, :, None]
    return (scale * q.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


#: the sixteen numbers of four bits (E2M1), doubled
#: the sixteen numbers of IQ4_NL and IQ4_XS
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4(b: Array) -> Array:
    """e u8 (a power of two, biased by 127), qs[16]: ``2^(e - 128) * E2M1[q]``, of numbers that are doubled."""
    return np.ldexp(_E2M1[_nibbles(b[:, 1:])], b[:, :1].astype(np.int32) - 128)


def _iq4_nl(b: Array) -> Array:
    """d f16, qs[16]: ``d * table[q]``."""
    return _half(b, 0) * _IQ4[_nibbles(b[:, 2:])]


def _iq4_xs(b: Array) -> Array:
    """d f16, scales_h[2] (two bits of each of eight scales), scales_l[4] (a nibble of each), qs[128]; eight runs of 32,
    ``d * (scale - 32) * table[q]``.
    """
    n = len(b)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(n, 8)
    high = ((b[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3).reshape(n, 8)
    scale = (low | (high << 4)).astype(np.float32) - 32
    values = _IQ4[_shifted(b[:, 8:].reshape(n, 8, 16), (0, 4), 15).reshape(n, 8, 32)]
    return ((_half(b, 0) * scale)[:, :, None] * values).reshape(n, 256)


def _quantised(name: str, block: int, nbytes: int, unpack: Callable[[Array], Array]) -> TensorType:
    return TensorType(name=name, block=block, nbytes=nbytes, dtype=np.dtype(np.float32), unpack=unpack)


def _by_package(name: str, block: int, nbytes: int) -> TensorType:
    """A rarer type, which the gguf package widens: what its bits stand for is in tables of thousands of numbers."""

    def unpack(blocks: Array) -> Array:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(blocks, GGMLQuantizationType[name])

    return TensorType(name=name, block=block, nbytes=nbytes, dtype=np.dtype(np.float32), unpack=unpack, package="gguf")


# Keys are ggml's type numbers in the file.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType(name="F32", block=1, nbytes=4, dtype=np.dtype("<f4")),
    1: TensorType(name="F16", block=1, nbytes=2, dtype=np.dtype("<f2")),
    2: _quantised("Q4_0", 32, 18, _q4_0),
    3: _quantised("Q4_1", 32, 20, _q4_1),
    6: _quantised("Q5_0", 32, 22, _q5_0),
    7: _quantised("Q5_1", 32, 24, _q5_1),
    8: _quantised("Q8_0", 32, 34, _q8_0),
    10: _quantised("Q2_K", 256, 84, _q2_k),
    11: _quantised("Q3_K", 256, 110, _q3_k),
    12: _quantised("Q4_K", 256, 144, _q4_k),
    13: _quantised("Q5_K", 256, 176, _q5_k),
    14: _quantised("Q6_K", 256, 210, _q6_k),
    16: _by_package("IQ2_XXS", 256, 66),
    17: _by_package("IQ2_XS", 256, 74),
    18: _by_package("IQ3_XXS", 256, 98),
    19: _by_package("IQ1_S", 256, 50),
    20: _quantised("IQ4_NL", 32, 18, _iq4_nl),
    21: _by_package("IQ3_S", 256, 110),
    22: _by_package("IQ2_S", 256, 82),
    23: _quantised("IQ4_XS", 256, 136, _iq4_xs),
    29: _by_package("IQ1_M", 256, 56),
    30: TensorType(name="BF16", block=1, nbytes=2, dtype=np.dtype(ml_dtypes.bfloat16)),
    34: _by_package("TQ1_0", 256, 54),
    35: _by_package("TQ2_0", 256, 66),
    39: _quantised("MXFP4", 32, 17, _mxfp4),
}

TENSOR_TYPE_BY_NAME: dict[str, TensorType] = {kind.name: kind for kind in TENSOR_TYPES.values()}


def dequantize_rows(raw: Array, kind: TensorType) -> Array:
    """Unpack rows of ``kind`` blocks.

    ``raw``: uint8 ``(rows, row_bytes)`` with ``row_bytes`` a multiple of ``kind.nbytes``.
    Returns ``(rows, row_bytes // kind.nbytes * kind.block)`` in ``kind.dtype``: float32 for quantised types.
    """
    rows, row_bytes = raw.shape
    if kind.unpack is None:
        return np.array(raw).view(kind.dtype)
    blocks_per_row = row_bytes // kind.nbytes
    width = blocks_per_row * kind.block
    out = np.empty((rows, width), np.float32)
    step = max(1, _VALUES_PER_CHUNK // max(width, 1))
    # A corrupt scale can be infinite or NaN; that is the caller's to notice, not a warning per block.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows, step):
            part = np.array(raw[start : start + step]).reshape(-1, kind.nbytes)
            out[start : start + step] = kind.unpack(part).reshape(-1, width)
    return out
