"""From the tensors of AWQ and GPTQ checkpoints to `Int4Weight`: integers move, nothing is rounded.

Both store eight integers of four bits in one of 32. Where each of them lies in its word:

    bits 0-3 first            AWQ                                      GPTQ
    qweight                   [K, N / 8], along N, in the order        [K / 8, N], along K, in order
                              0 2 4 6 1 3 5 7
    qzeros                    [K / g, N / 8], as qweight               [K / g, N / 8], along N, in order, of zero - 1
    scales                    [K / g, N]                               [K / g, N]

AWQ's word of columns 8c..8c+7 has column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i] in bits 4i..4i+3. GPTQ's first format
("gptq", the common one) stores its zeros one too small, so they are 1..16; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.layout import Int4Weight, int4_weight, pack

#: the column (of eight) that lies in bits 4i..4i+3 of AWQ's word
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))


def from_awq(qweight: jax.Array, qzeros: jax.Array, scales: jax.Array) -> Int4Weight:
    """AWQ ("gemm" version, 4 bits): qweight i32 [K, N / 8], qzeros i32 [K / g, N / 8], scales [K / g, N].

    Raises ValueError where the shapes do not fit together.
    """
    k, groups = qweight.shape[0], scales.shape[0]
    _check(qweight.shape == (k, scales.shape[1] // 8), "qweight", "[K, N / 8]", qweight, scales)
    _check_groups(k, qzeros, scales)
    q = _unpack_columns(qweight, AWQ_ORDER)
    return int4_weight(pack(q.T, k // groups), scales, _unpack_columns(qzeros, AWQ_ORDER))


def from_gptq(
    qweight: jax.Array,
    qzeros: jax.Array,
    scales: jax.Array,
    *,
    g_idx: jax.Array | None = None,
    zeros_stored_less_one: bool = True,
) -> tuple[Int4Weight, jax.Array | None]:
    """GPTQ (4 bits): qweight i32 [K / 8, N], qzeros i32 [K / g, N / 8], scales [K / g, N].

    ``g_idx`` i32 [K], a concrete array: the group of each element of K. Where it is not simply ``k // g`` (a model
    quantized with ``desc_act``) the elements are sorted by it, and x must be too: the second result is then the order,
    i32 [K], and the product is that of ``x[..., order]``. Otherwise it is None.
    ``zeros_stored_less_one``: False for the format "gptq_v2".
    Raises ValueError where the shapes do not fit together or a group has not g elements.
    """
    k, groups = qweight.shape[0] * 8, scales.shape[0]
    _check(qweight.shape[1] == scales.shape[1], "qweight", "[K / 8, N]", qweight, scales)
    _check_groups(k, qzeros, scales)
    shifts = jnp.arange(8, dtype=jnp.uint32) * 4
    words = jax.lax.bitcast_convert_type(qweight, jnp.uint32)
    q = ((words[:, None, :] >> shifts[:, None]) & 15).astype(jnp.uint8).reshape(k, -1)
    order = None if g_idx is None else _order(g_idx, k, groups)
    if order is not None:
        q = q[order]
    zeros = _unpack_columns(qzeros, IN_ORDER) + jnp.uint8(zeros_stored_less_one)
    return int4_weight(pack(q.T, k // groups), scales, zeros), order


def _order(g_idx: jax.Array, k: int, groups: int) -> jax.Array | None:
    if g_idx.shape != (k,):
        raise ValueError(f"g_idx must have the {k} elements of K, got shape {g_idx.shape}")
    counts = jnp.bincount(g_idx, length=groups)
    if not bool(jnp.all(counts == k // groups)):
        raise ValueError(f"g_idx must give each of the {groups} groups {k // groups} elements, got {counts.tolist()}")
    if bool(jnp.all(g_idx == jnp.arange(k) // (k // groups))):
        return None
    return jnp.argsort(g_idx, stable=True).astype(jnp.int32)


def _unpack_columns(words: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """i32 [R, N / 8] -> uint8 [R, N]; order: the column that each four bits hold."""
    place = jnp.asarray([order.index(column) for column in range(8)], jnp.uint32)
    unsigned = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return ((unsigned[:, :, None] >> place * 4) & 15).astype(jnp.uint8).reshape(words.shape[0], -1)


def _check_groups(k: int, qzeros: jax.Array, scales: jax.Array) -> None:
    groups, n = scales.shape
    _check(n % 8 == 0, "scales", "[K / g, N] with N a multiple of 8", scales, scales)
    _check(groups > 0 and k % groups == 0, "scales", f"[K / g, N] with g dividing K = {k}", scales, scales)
    _check(qzeros.shape == (groups, n // 8), "qzeros", "[K / g, N / 8]", qzeros, scales)


def _check(fits: bool, name: str, expected: str, array: jax.Array, scales: jax.Array) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {array.shape} beside scales [K / g, N] {scales.shape}")
