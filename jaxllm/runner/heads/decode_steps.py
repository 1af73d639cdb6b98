"""Several decode steps in one launch: what a step sampled is the next one's input, and the host is not asked.

Every row goes on until it has its tokens or samples one that ends it; the launch is over when no row goes on. What the
host schedules before it has read of an end is recognised here: a row whose input is such a token, or the mark that an
earlier launch has left behind one, does nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.context import StepBatch
from jaxllm.models.adapters import with_slots
from jaxllm.models.decoder import forward_keeping, no_load
from jaxllm.models.params import Params
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.sampling_step import ENDED, State, StepConfig, place_known_tokens, sample_rows
from jaxllm.runner.packing import Packing, attention_batch, with_pictures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """S: sequences of the bucket, N: `num_decode_steps`."""

    step: jax.Array  # i32 []
    state: State
    going_on: jax.Array  # bool [S]
    sampled: jax.Array  # i32 [N, S]; -1 where nothing was
    load: jax.Array | None  # as `Hidden.load`, of all steps


def decode_steps(
    config: StepConfig,
    num_steps: int,
    rows: int,
    bucket: Bucket,
    packing: Packing,
    sample_packing: Packing,
    params: Params,
    state: State,
    buffer: jax.Array,
    constraints: jax.Array | None,
) -> tuple[State, jax.Array | tuple[jax.Array, jax.Array]]:
    """Up to `num_steps` tokens for each row of a step in which every sequence has one token.

    Args:
        config, num_steps, rows (of a slice, as in `sample_step`), bucket, packing, sample_packing: static.
        buffer: int32, `decode_packing`'s fields, then `sample_packing`'s.
        constraints: as in `sample_step`; the same in every step.

    Returns:
        (state, sampled): i32 [num_steps, S], sequences in the buffer's order; -1 where a row had ended; with
        `Hidden.load` of all steps where it is counted.
    """
    fields = packing.unpack(buffer)
    sampling = sample_packing.unpack(buffer[packing.size :])
    # the first S of the sampler's rows are the step's sequences
    sampling = {name: field[: bucket.seqs] if field.ndim else field for name, field in sampling.items()}
    constraints = None if constraints is None else constraints[: bucket.seqs]
    if bucket.adapters:
        params = with_slots(params, fields["adapter_slots"], config.context.backend)
    attention = attention_batch(fields, bucket)
    trash = state.tokens.shape[0] - 1
    row, first, limits = fields["rows"], fields["positions"], fields["steps"]

    def ends(ids: jax.Array) -> jax.Array:
        return (ids == ENDED) | jnp.any(fields["end_ids"] == ids[:, None], axis=1)

    def one_step(loop: _Loop) -> _Loop:
        position = jnp.where(loop.going_on, first + loop.step, 0)
        active_row = jnp.where(loop.going_on, row, trash)
        now = dataclasses.replace(attention, positions=position, kv_lens=position + 1, token_valid=loop.going_on)
        # all of them are generated, and go on behind pictures as the first of them did
        batch = with_pictures(StepBatch(tokens=loop.state.tokens[active_row, position], attention=now), fields, None)
        cache, hidden, load, _ = forward_keeping(
            config.context, config.model, config.groups, params, loop.state.cache, batch, counts=config.expert_load
        )
        # what is compiled for the sampler is to be what a step alone has
        hidden = lax.optimization_barrier(hidden)
        tokens, found = sample_rows(
            config,
            rows,
            params,
            loop.state.tokens,
            hidden,
            {**sampling, "rows": active_row, "positions": position + 1},
            constraints,
        )
        new = jnp.where(loop.going_on, found.token_ids, ENDED)
        return _Loop(
            step=loop.step + 1,
            state=State(cache=cache, tokens=tokens),
            going_on=loop.going_on & ~ends(new) & (loop.step + 1 < limits),
            sampled=lax.dynamic_update_index_in_dim(loop.sampled, new, loop.step, 0),
            load=load if load is None or loop.load is None else loop.load + load,
        )

    tokens = place_known_tokens(state.tokens, fields, attention)
    loop = _Loop(
        step=jnp.int32(0),
        state=State(cache=state.cache, tokens=tokens),
        going_on=(limits > 0) & ~ends(tokens[row, first]),
        sampled=jnp.full((num_steps, bucket.seqs), ENDED, jnp.int32),
        load=no_load(config.model) if config.expert_load else None,
    )
    loop = lax.while_loop(lambda loop: jnp.any(loop.going_on) & (loop.step < num_steps), one_step, loop)
    early = jnp.sum(loop.sampled != ENDED, axis=0) < limits
    marked = jnp.where(early, row, trash + 1)
    tokens = loop.state.tokens.at[marked, first + limits].set(ENDED, mode="drop")
    state = dataclasses.replace(state, cache=loop.state.cache, tokens=tokens)
    return state, (loop.sampled if loop.load is None else (loop.sampled, loop.load))
