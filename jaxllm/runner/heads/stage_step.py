"""The compiled step of one pipeline stage, and how sampled tokens come back to the first one.

Each stage does what `sampling_step.forward_step` does, of its own layers. The first one and the last one each have
`State.tokens`: the first finds there what was sampled, and takes it as input; the last, whose samplers write there,
finds what penalties look at. A stage between them has none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.layers.context import StepBatch
from jaxllm.models.adapters import with_slots
from jaxllm.models.decoder import forward_keeping
from jaxllm.models.params import Params
from jaxllm.parallel.stages import Stage
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.sampling_step import Hidden, State, StepConfig, step_tokens, wanted_rows
from jaxllm.runner.packing import Packing, step_attention, with_pictures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unwritten:
    """Sampled tokens on the first stage's devices that its `State.tokens` has not got yet."""

    ids: jax.Array  # i32 [R], `Sampled.token_ids`
    sampling: jax.Array  # int32, `sample_packing`'s fields
    #: the rows that may have one
    rows: frozenset[int] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PipelineState:
    """What stays on the stages' devices between steps.

    What a step has sampled is written into the first stage's `State.tokens` when a step that needs it is launched, and
    not before: the steps between them would wait for the last stage.
    """

    stages: tuple[State, ...]
    #: the oldest first
    unwritten: tuple[Unwritten, ...] = ()


def stage_step(
    config: StepConfig,
    stage: Stage,
    bucket: Bucket,
    packing: Packing,
    params: Params,
    state: State,
    buffer: jax.Array,
    given: jax.Array | None = None,
) -> tuple[State, Hidden | jax.Array | tuple[jax.Array, jax.Array], jax.Array]:
    """Compute the scheduled tokens' way through the stage's layers, and write their keys and values.

    Args:
        config (of the stage's layers), stage, bucket, packing: static.
        buffer: as in `sampling_step.forward_step`; the same for all stages.
        given: [T, d] what the stage before has computed; of the first stage the vectors of prompts, where the engine
            takes such prompts.

    Returns:
        (state, hidden, sampling): hidden is [T, d] for the next stage, with the load of the stage's experts where it is
        counted (`Hidden.load`), or the last one's `Hidden`; sampling is the buffer's second part.
    """
    fields = packing.unpack(buffer)
    if bucket.adapters:
        params = with_slots(params, fields["adapter_slots"], config.context.backend)
    attention = step_attention(fields, bucket)
    tokens, batch = state.tokens, StepBatch(tokens=fields["token_ids"], attention=attention)
    if tokens is not None:
        tokens, batch = step_tokens(config, tokens, fields, attention)
    batch = dataclasses.replace(batch, **{"embeddings" if stage.is_first else "hidden": given})
    batch = with_pictures(batch, fields, state.encoded)
    cache, hidden, load, _ = forward_keeping(
        config.context, config.model, config.groups, params, state.cache, batch, counts=config.expert_load
    )
    made: Hidden | jax.Array | tuple[jax.Array, jax.Array] = hidden if load is None else (hidden, load)
    if stage.is_last:
        made = dataclasses.replace(wanted_rows(config, tokens, fields, hidden), load=load)
    return dataclasses.replace(state, cache=cache, tokens=tokens), made, buffer[packing.size :]


def take_sampled(packing: Packing, tokens: jax.Array, ids: jax.Array, buffer: jax.Array) -> jax.Array:
    """The first stage's `State.tokens`, donated, with what a step's sampler has made.

    Args:
        packing: static.
        ids: i32 [R], `Sampled.token_ids`.
        buffer: int32, `sample_packing`'s fields.
    """
    fields, trash = packing.unpack(buffer), tokens.shape[0] - 1
    row = jnp.where(jnp.arange(len(ids), dtype=jnp.int32) < fields["num_samples"], fields["rows"], trash)
    return tokens.at[row, fields["positions"]].set(ids, mode="drop")
