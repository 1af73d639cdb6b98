"""Decode steps that check drafts: several positions of a row in one forward pass, as far as the drafts for them hold.

A draft for a position is right where the token that is sampled there, exactly as a step without drafts would sample it
(same logits, same seed, same position), is the draft. So what is right needs no rule of its own for any kind of
sampling: outputs are distributed as without drafts, and for one seed they are the same tokens.

How many tokens a launch brings is known when it is done. The next launch of a row, which is scheduled before that, goes
on where the device stands (`State.drafting`), and the host learns of it from the results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.api.sampling_params import MAX_LOGPROB_TOKEN_IDS
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.adapters import with_slots
from jaxllm.models.decoder import no_load
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params, draft_params
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.sampling_fields import BEGINS, GIVES_UP
from jaxllm.runner.heads.sampling_step import (
    ENDED,
    Sampled,
    State,
    StepConfig,
    compute,
    place_known_tokens,
    sample_rows,
)
from jaxllm.runner.packing import Packing, attention_batch
from jaxllm.sampling.logprobs import Logprobs
from jaxllm.speculative.adaptive import AdaptiveDrafts
from jaxllm.speculative.draft_model import GIVEN_UP, ModelDrafter
from jaxllm.speculative.drafter import Asked, Checked, Drafter, Written, columns_of
from pallas_kernels.batch import AttentionBatch


class DraftParams(NamedTuple):
    """The weights, in the forms that the two kinds of step take them in."""

    #: of steps in which nobody has a draft
    single: Params
    #: of checks, one for each of `AdaptiveDrafts.lengths`
    several: tuple[Params, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftSteps:
    """What a launch brought. S: sequences, N: steps, K: drafts of a step."""

    token_ids: jax.Array  # i32 [S, N * (1 + K)]
    counts: jax.Array  # i32 [S]
    drafted: jax.Array  # i32 [N, S]
    accepted: jax.Array  # i32 [N, S]
    kinds: jax.Array  # i32 [1 + L]: steps without drafts, and checks of each of `AdaptiveDrafts.lengths`
    #: [S, N * (1 + K), ...], of `token_ids`; None from the greedy-only program
    logprobs: Logprobs | None
    load: jax.Array | None  # as `Hidden.load`, of all steps


class _Hidden(NamedTuple):
    """Of a step."""

    states: jax.Array  # [1 + K, S, d]: one position of every sequence behind the other
    load: jax.Array | None
    taken: jax.Array | None  # [1 + K, S, h], as `compute` has it


_Computed = tuple[State, _Hidden]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    step: jax.Array  # i32 []
    state: State
    going_on: jax.Array  # bool [S]
    reached: jax.Array  # i32 [S]: position of the last token
    numbers: jax.Array  # i32 [S, AdaptiveDrafts.COLUMNS]
    behind: jax.Array  # i32 [S], as `Asked.behind`
    found: DraftSteps


def draft_steps(
    config: StepConfig,
    drafter: Drafter,
    adaptive: AdaptiveDrafts,
    num_steps: int,
    rows: int,
    bucket: Bucket,
    packing: Packing,
    sample_packing: Packing,
    params: DraftParams,
    state: State,
    buffer: jax.Array,
    constraints: jax.Array | None,
) -> tuple[State, DraftSteps]:
    """Up to ``num_steps * (1 + drafter.num_drafts)`` tokens for each row, and at least one.

    Args:
        config, drafter, adaptive, num_steps, rows (of a slice, as in `sample_step`), bucket, packing, sample_packing:
            static.
        buffer: int32, `draft_packing`'s fields, then `sample_packing`'s.
        constraints: int32 [1 + K, S, row_size], of each position of a step; None as in `sample_step`.
    """
    # the launch has loops anyway
    config = dataclasses.replace(config, fixed_sample_rows=None)
    drafts, seqs = drafter.num_drafts, bucket.seqs
    width = 1 + drafts
    fields = packing.unpack(buffer)
    sampling = sample_packing.unpack(buffer[packing.size :])
    # the first S of the sampler's rows are the step's sequences
    sampling = {name: field[:seqs] if field.ndim else field for name, field in sampling.items()}
    if bucket.adapters:
        slots, backend = fields["adapter_slots"], config.context.backend
        several = zip(adaptive.lengths, params.several, strict=True)
        params = DraftParams(
            single=with_slots(params.single, slots, backend),
            several=tuple(with_slots(own, jnp.repeat(slots, 1 + length), backend) for length, own in several),
        )
    attention = attention_batch(fields, bucket)
    trash, lane = state.tokens.shape[0] - 1, jnp.arange(width, dtype=jnp.int32)
    assert state.drafting is not None
    limits = fields["steps"]
    row = jnp.where(limits > 0, fields["rows"], trash)
    first = jnp.where(fields["resumes"] != 0, state.drafting[row, 0], fields["positions"])
    extra, is_given = fields["check_costs"], fields["num_given"] >= 0
    beginning = adaptive.beginning(fields["first_credit"])
    begins = fields["begins"] & BEGINS != 0
    numbers = jnp.where(begins[:, None], beginning, state.drafting[row, 1:-1])
    behind = jnp.where(fields["begins"] & GIVES_UP != 0, GIVEN_UP, _behind(fields, state.drafting[row, -1]))

    def ends(ids: jax.Array) -> jax.Array:
        """bool, of i32 [S, ...]."""
        end_ids = fields["end_ids"].reshape(seqs, *(1,) * (ids.ndim - 1), -1)
        return (ids == ENDED) | jnp.any(end_ids == ids[..., None], axis=-1)

    def turned(now: AttentionBatch, columns: int) -> jax.Array | None:
        """`StepBatch.rope_positions` of so many positions of every sequence, all of them generated."""
        if "rope_offsets" not in fields:
            return None
        return now.positions + jnp.repeat(fields["rope_offsets"], columns, axis=1)

    def computed(state: State, batch: StepBatch, params: Params, columns: int) -> _Computed:
        """A forward pass over so many positions of every sequence."""
        state, hidden, load, taken = compute(config, params, state, batch, drafter_reads=False)

        def by_position(array: jax.Array) -> jax.Array:
            array = jnp.swapaxes(array.reshape(seqs, columns, -1), 0, 1)
            return jnp.pad(array, ((0, width - columns), (0, 0), (0, 0)))

        return state, _Hidden(by_position(hidden), load, None if taken is None else by_position(taken))

    def sampled(state: State, hidden: jax.Array, row: jax.Array, position: jax.Array, kind: jax.Array) -> Sampled:
        """What is sampled at the positions of a step; rubbish at those that its kind has not."""
        # what is compiled for the sampler is to be what a step alone has
        hidden = lax.optimization_barrier(hidden).reshape(width * seqs, -1)
        own = {
            name: jnp.tile(field, (width,) + (1,) * (field.ndim - 1)) for name, field in sampling.items() if field.ndim
        }
        columns = jnp.asarray((1, *(1 + length for length in adaptive.lengths)), jnp.int32)[kind]
        own |= {name: field for name, field in sampling.items() if not field.ndim}
        own |= {
            "rows": jnp.tile(row, width),
            "positions": (position + lane[:, None] + 1).reshape(-1),
            "num_samples": jnp.where(kind == 0, sampling["num_samples"], columns * seqs),
        }
        given = None if constraints is None else constraints.reshape(width * seqs, -1)
        _, result = sample_rows(config, rows, params.single, state.tokens, hidden, own, given)

        def by_sequence(array: jax.Array) -> jax.Array:
            return jnp.swapaxes(array.reshape(width, seqs, *array.shape[1:]), 0, 1)

        return jax.tree.map(by_sequence, result)

    def passed_over(loop: _Loop, written: Written, drafted: jax.Array, count: jax.Array) -> jax.Array:
        """`Asked.behind` of the next step, of the drafter's own drafts in this one, and the tokens that it brought: of
        those that the host has drafted it has read none.
        """
        if written.behind is None:
            return loop.behind
        left = jnp.where(drafted > 0, 0, jnp.maximum(written.behind + count - 1, 0))
        return jnp.where(loop.going_on, left, loop.behind)

    def one_step(loop: _Loop) -> _Loop:
        active_row = jnp.where(loop.going_on, row, trash)
        position = jnp.where(loop.going_on, loop.reached, 0)

        def sample_of(model: DecoderConfig, params: Params, hidden: jax.Array, positions: jax.Array) -> jax.Array:
            other = dataclasses.replace(config, model=model, num_logprobs=0)
            own = {**sampling, "rows": active_row, "positions": positions + 1}
            given = None if constraints is None else constraints[0]
            return sample_rows(other, rows, params, loop.state.tokens, hidden, own, given)[1].token_ids

        most = jnp.maximum(jnp.minimum(limits - loop.found.counts - 1, fields["most_drafts"]), 0)
        asked = Asked(
            context=config.context,
            params=draft_params(params.single),
            params_of_several=draft_params(params.several[-1]),
            attention=attention,
            tokens=loop.state.tokens[active_row],
            positions=position,
            going_on=loop.going_on,
            outputs=loop.state.outputs,
            most=jnp.where(is_given, 0, most),
            behind=loop.behind,
            rope_offsets=fields.get("rope_offsets"),
            sample=sample_of,
        )
        look, counts = drafter.look(asked)
        counts = jnp.where(is_given & loop.going_on, jnp.minimum(fields["num_given"], most), counts)
        kind, counts = adaptive.choose(loop.numbers, counts, loop.going_on, extra)
        written = drafter.write(asked, loop.state.draft_cache, look, jnp.where(is_given, 0, counts))
        ids = jnp.where(is_given[:, None], fields["given"], written.ids)
        loop = dataclasses.replace(loop, state=dataclasses.replace(loop.state, draft_cache=written.cache))

        # whoever looks for a position's earlier tokens finds the drafts among them
        place = jnp.where(lane[1:] <= counts[:, None], position[:, None] + lane[1:], loop.state.tokens.shape[1])
        tokens = loop.state.tokens.at[active_row[:, None], place].set(ids, mode="drop")
        given = jnp.concatenate([tokens[active_row, position][:, None], ids], axis=1)
        loop = dataclasses.replace(loop, state=dataclasses.replace(loop.state, tokens=tokens))

        def single(loop: _Loop) -> _Computed:
            now = dataclasses.replace(attention, positions=position, kv_lens=position + 1, token_valid=loop.going_on)
            batch = StepBatch(tokens=given[:, 0], attention=now, rope_positions=turned(now, 1))
            return computed(loop.state, batch, params.single, 1)

        def several(length: int, params: Params, loop: _Loop) -> _Computed:
            now = columns_of(attention, position, loop.going_on, counts, 1 + length)
            own = given[:, : 1 + length].reshape(-1)
            batch = StepBatch(tokens=own, attention=now, rope_positions=turned(now, 1 + length))
            return computed(loop.state, batch, params, 1 + length)

        checks = zip(adaptive.lengths, params.several, strict=True)
        kinds = [single, *(functools.partial(several, *check) for check in checks)]
        state, (hidden, load, taken) = _one_of(kind, kinds, loop)
        result = sampled(state, hidden, active_row, position, kind)
        new, logprobs = result.token_ids, result.logprobs
        right = (new[:, :drafts] == ids) & (lane[:drafts] < counts[:, None])
        accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)
        checked = Checked(ids, jnp.where(is_given, 0, counts), accepted, taken)
        state = dataclasses.replace(state, draft_cache=drafter.settle(asked, state.draft_cache, checked))
        is_new = lane <= accepted[:, None]
        end = is_new & ends(new)
        is_new &= jnp.cumsum(end, axis=1) - end == 0
        # no token at all is an end that is not to be told
        is_new &= (new != ENDED) & loop.going_on[:, None]
        count = jnp.sum(is_new, axis=1, dtype=jnp.int32)
        # what drafts that were wrong have left behind is anything
        place = jnp.where(is_new, position[:, None] + 1 + lane, tokens.shape[1])
        tokens = state.tokens.at[active_row[:, None], place].set(new, mode="drop")
        state = dataclasses.replace(state, tokens=tokens)
        found, seq = loop.found, jnp.arange(seqs)[:, None]
        place = jnp.where(is_new, found.counts[:, None] + lane, found.token_ids.shape[1])
        found = DraftSteps(
            token_ids=found.token_ids.at[seq, place].set(new, mode="drop"),
            logprobs=jax.tree.map(lambda o, n: o.at[seq, place].set(n, mode="drop"), found.logprobs, logprobs),
            counts=found.counts + count,
            drafted=lax.dynamic_update_index_in_dim(found.drafted, counts, loop.step, 0),
            accepted=lax.dynamic_update_index_in_dim(found.accepted, jnp.minimum(accepted, count), loop.step, 0),
            kinds=found.kinds.at[kind].add(1),
            load=load if load is None or found.load is None else found.load + load,
        )
        return _Loop(
            step=loop.step + 1,
            state=state,
            # behind drafts of the host, the host goes on
            going_on=loop.going_on & ~jnp.any(end, axis=1) & (found.counts < limits) & ~is_given,
            reached=loop.reached + count,
            numbers=adaptive.after(loop.numbers, kind, counts, accepted, loop.going_on, extra),
            behind=passed_over(loop, written, checked.counts, count),
            found=found,
        )

    tokens = place_known_tokens(state.tokens, fields, attention)
    nothing = jnp.zeros((num_steps, seqs), jnp.int32)
    loop = _Loop(
        step=jnp.int32(0),
        state=dataclasses.replace(state, tokens=tokens),
        going_on=(limits > 0) & ~ends(tokens[row, first]),
        reached=first,
        numbers=numbers,
        behind=behind,
        found=DraftSteps(
            token_ids=jnp.zeros((seqs, num_steps * width), jnp.int32),
            counts=jnp.zeros(seqs, jnp.int32),
            drafted=nothing,
            accepted=nothing,
            kinds=jnp.zeros(1 + len(adaptive.lengths), jnp.int32),
            logprobs=None if constraints is None else _no_logprobs(seqs, num_steps * width, config.num_logprobs),
            load=no_load(config.model) if config.expert_load else None,
        ),
    )
    loop = lax.while_loop(lambda loop: jnp.any(loop.going_on) & (loop.step < num_steps), one_step, loop)
    drafting = loop.state.drafting
    assert drafting is not None
    left = jnp.concatenate([loop.reached[:, None], loop.numbers, loop.behind[:, None]], axis=1)
    return dataclasses.replace(loop.state, drafting=drafting.at[row].set(left)), loop.found


def catch_up(
    context: Context,
    drafter: ModelDrafter,
    bucket: Bucket,
    packing: Packing,
    params: Params,
    state: State,
    buffer: jax.Array,
) -> State:
    """Let a model that drafts read what it has passed over, before a step that it reads.

    Args:
        context, drafter, bucket, packing: static.
        params: of what drafts.
        buffer: int32, `catch_up_packing`'s fields, of the next token of each sequence.
    """
    fields = packing.unpack(buffer)
    assert state.drafting is not None and state.draft_cache is not None
    trash = state.tokens.shape[0] - 1
    row = jnp.where(jnp.arange(bucket.seqs) < fields["num_seqs"], fields["rows"], trash)
    left = _behind(fields, state.drafting[row, -1])
    behind = jnp.where((row < trash) & (left < GIVEN_UP), left, 0)
    attention, positions = attention_batch(fields, bucket), fields["positions"]
    cache: Any = state.draft_cache
    offsets = fields.get("rope_offsets")
    cache = drafter.catch_up(context, params, cache, attention, state.tokens[row], positions, behind, offsets)
    return dataclasses.replace(state, draft_cache=cache, drafting=state.drafting.at[row, -1].set(left - behind))


def _behind(fields: dict[str, jax.Array], kept: jax.Array) -> jax.Array:
    """i32 [S], tokens that a model which drafts has passed over.

    Args:
        kept: i32 [S], those of `State.drafting`, which are another request's where a row begins.
    """
    kept = jnp.where(fields["begins"] & BEGINS != 0, 0, kept)
    return jnp.where(kept < GIVEN_UP, kept + fields["passed_over"], kept)


def _no_logprobs(seqs: int, width: int, num_logprobs: int) -> Logprobs:
    flat = Logprobs.zeros(seqs * width, num_logprobs, MAX_LOGPROB_TOKEN_IDS)
    return jax.tree.map(lambda array: array.reshape(seqs, width, *array.shape[1:]), flat)


def _one_of(index: jax.Array, branches: Sequence[Callable[[_Loop], _Computed]], loop: _Loop) -> _Computed:
    """``lax.switch(index, branches, loop)`` that leaves the cache where it is: XLA:CPU copies what a branch changes,
    and not what a loop does, of which each takes one round or none.
    """

    def round_of(branch: Callable[[_Loop], _Computed]) -> Callable[[tuple[_Loop, Any, Any]], tuple[_Loop, Any, Any]]:
        def once(carry: tuple[_Loop, Any, Any]) -> tuple[_Loop, Any, Any]:
            state, found = branch(carry[0])
            return dataclasses.replace(carry[0], state=state), found, jnp.bool_(False)

        return once

    _, shapes = jax.eval_shape(branches[0], loop)
    found = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    for number, branch in enumerate(branches):
        carry = loop, found, index == number
        loop, found, _ = lax.while_loop(lambda carry: carry[2], round_of(branch), carry)
    return loop.state, found
