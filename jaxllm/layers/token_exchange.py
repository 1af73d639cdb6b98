"""Tokens on their way to experts that copies of a model have between them, and back. Each copy has tokens of its own.

Either every copy gets the tokens of all (an all-gather), and the sums of each copy's tokens go back to it (a
reduce-scatter); or each token goes to those copies only that have its experts (all-to-all, twice). All-to-all has room
for a fixed number of tokens from each copy to each other one. It moves fewer bytes where tokens go to few of many
copies, and waits for the host on a GPU, so it is for large steps. Where the room does not suffice for what the router
chooses, all copies get all tokens: none is dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.context import Context, exchanged
from jaxllm.layers.routing import Routed

#: tokens of a copy, from which on they may be sent
LEAST_SENT = 256
#: of the tokens that go to a copy where all experts are equally likely, so many times as many have room
ROOM = 1.5


def of_all_copies(context: Context, x: jax.Array) -> jax.Array:
    """The tokens' rows x [T, ...] of all C copies of the model that step together, [C * T, ...]; x where there is but
    one.
    """
    axis = context.mesh_axis("tokens")
    if axis is None:
        return x
    with exchanged("tokens"):
        return lax.all_gather(x, axis, tiled=True)


def room_for_sent(tokens: int, copies: int, top_k: int) -> int | None:
    """Of the tokens of a copy, how many have room in what it sends to each copy; None: all copies get all tokens, since
    that moves about as few bytes, or takes less time.
    """
    share = 1 - (1 - 1 / copies) ** top_k
    room = math.ceil(ROOM * share * tokens / 8) * 8
    return room if tokens >= LEAST_SENT and 2 * room <= tokens else None


def through_all_copies(
    context: Context,
    x: jax.Array,
    valid: jax.Array | None,
    *,
    num_experts: int,
    top_k: int,
    routed: Callable[[jax.Array], Routed],
    compute: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """What the experts of all copies add to a copy's tokens, float32 [T, d]: what those of one device of each copy add.
    The sum over the devices of a copy is left to the caller.

    Args:
        x: [T, d], the copy's own.
        valid: bool [C * T], which tokens of all copies are no padding; None: all.
        routed: (rows [N, d]) -> their experts.
        compute: (rows [N, d], weights, chosen, valid [N]) -> what the device's own experts add to them, float32 [N, d].
    """
    axis = context.mesh_axis("tokens")
    assert axis is not None
    copies, tokens = lax.axis_size(axis), len(x)

    def gathered() -> jax.Array:
        rows = of_all_copies(context, x)
        y = compute(rows, *routed(rows), valid)
        with exchanged("tokens"):
            return lax.psum_scatter(y.astype(x.dtype), axis, tiled=True).astype(jnp.float32)

    room = room_for_sent(tokens, copies, top_k)
    if room is None:
        return gathered()
    weights, chosen = routed(x)
    goes = (chosen[:, :, None] // (num_experts // copies) == jnp.arange(copies)).any(axis=1)  # [T, C]
    if valid is not None:
        goes &= lax.dynamic_slice_in_dim(valid, lax.axis_index(axis) * tokens, tokens)[:, None]
    counts = goes.sum(axis=0, dtype=jnp.int32)

    def sent() -> jax.Array:
        there = jnp.arange(room) < counts[:, None]  # [C, room]
        order = jnp.argsort(~goes, axis=0, stable=True)[:room].T
        # both as one array; what is not there goes to no expert
        choice = jnp.concatenate([lax.bitcast_convert_type(weights, jnp.int32), chosen], axis=1)
        choice = jnp.where(there[:, :, None], choice[order], -1)
        with exchanged("tokens"):
            rows, choice = (lax.all_to_all(each, axis, 0, 0) for each in (x[order], choice))
        rows, choice = (each.reshape(copies * room, -1) for each in (rows, choice))
        own_weights = lax.bitcast_convert_type(choice[:, :top_k], jnp.float32)
        y = compute(rows, own_weights, choice[:, top_k:], None).astype(x.dtype)
        with exchanged("tokens"):
            y = lax.all_to_all(y.reshape(copies, room, -1), axis, 0, 0).astype(jnp.float32)
        # a token's sums in the order of the copies
        place = jnp.cumsum(goes, axis=0) - 1
        each = (jnp.where(goes[:, i, None], y[i, place[:, i]], 0.0) for i in range(copies))
        return functools.reduce(jnp.add, each)

    # the same for all devices, which exchange the same then
    everywhere = context.mesh_axis("experts") or axis
    return lax.cond(lax.pmax(counts.max(), everywhere) > room, gathered, sent)
