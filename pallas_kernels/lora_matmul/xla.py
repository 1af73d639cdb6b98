"""What adapters add to a product, by XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora_matmul.reference import places

#: rows up to which each gets its own adapter's matrices, which cost less to fetch than all to multiply by
MOST_GATHERED_ROWS = 4
#: rows from which on XLA:CPU adds up all numbers of a product in the same order
LEAST_ALIKE_ROWS = 4


def lora_matmul_xla(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...]) -> jax.Array:
    """`lora_matmul_reference`, of b whose numbers are finite in every slot. Differentiable in x, a and b.

    All slots' matrices are one, so that there are two dense products: the first makes the numbers of every slot for
    every row, those of other slots become zeros, and the second adds over slots and ranks at once. For few slots that
    costs less than any way of sorting, since what a product costs on a CPU is mostly not its arithmetic.
    What is multiplied has the wider type of x and the adapters; sums are float32.
    """
    rows, (num_slots, rank, _) = x.shape[0], b.shape
    if rows <= MOST_GATHERED_ROWS:
        return _gathered(x, a, b, slots, parts)
    dtype = jnp.promote_types(x.dtype, a.dtype)
    low = _product(x.astype(dtype), a.reshape(-1, a.shape[-1]).astype(dtype)).reshape(rows, num_slots, -1)
    low = jnp.where(slots[:, None, None] == jnp.arange(num_slots)[:, None], low, 0).astype(dtype)
    made = [
        _product(low[..., ranks].reshape(rows, -1), b[..., features].reshape(num_slots * rank, -1).astype(dtype).T)
        for features, ranks in places(parts, rank)
    ]
    return jnp.concatenate(made, axis=1)


def lora_matmul_by_slot(
    x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...]
) -> jax.Array:
    """`lora_matmul_reference`, slot by slot: on a CPU a row has the same bits whatever other rows there are, and
    wherever its adapter lies. Differentiable in x, a and b.
    """
    rows, dtype = x.shape[0], jnp.promote_types(x.dtype, a.dtype)
    alike = max(LEAST_ALIKE_ROWS - rows, 0)
    x, slots = jnp.pad(x.astype(dtype), ((0, alike), (0, 0))), jnp.pad(slots, (0, alike), constant_values=-1)

    def add_slot(out: jax.Array, slot: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, a, b = slot
        own = (slots == number)[:, None]
        low = _product(jnp.where(own, x, 0), a.astype(dtype)).astype(dtype)
        made = [_product(low[:, ranks], b[:, features].T.astype(dtype)) for features, ranks in places(parts, len(b))]
        return jnp.where(own, jnp.concatenate(made, axis=1), out), None

    zeros = jnp.zeros((x.shape[0], b.shape[2]), jnp.float32)
    return lax.scan(add_slot, zeros, (jnp.arange(len(a), dtype=jnp.int32), a, b))[0][:rows]


def _gathered(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, parts: tuple[int, ...]) -> jax.Array:
    """Products as sums, which XLA:CPU compiles to loops in vectors."""
    own, has_one = jnp.maximum(slots, 0), (slots >= 0)[:, None]
    low = jnp.sum(x[:, None].astype(jnp.float32) * a[own].astype(jnp.float32), axis=-1)
    of_slots = b[own].astype(jnp.float32)
    made = [
        jnp.sum(low[:, ranks, None] * of_slots[..., features], axis=1) for features, ranks in places(parts, b.shape[1])
    ]
    return jnp.where(has_one, jnp.concatenate(made, axis=1), 0)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K] @ weight [N, K].T, float32 [T, N]."""
    return lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
