"""The compiled step, for every kind of request: tokens in, keys and values written, tokens out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.api.logits_processor import LogitsProcessor
from jaxllm.api.sampling_params import MAX_LOGPROB_TOKEN_IDS
from jaxllm.config.cache import KVCacheGroup
from jaxllm.engine.step import EMBEDDED
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.adapters import with_slots
from jaxllm.models.decoder import forward_keeping, logits
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params, draft_params
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.heads.sampling_fields import FLAGS, FLOATS, INTS
from jaxllm.runner.packing import Packing, step_attention, with_pictures
from jaxllm.sampling.batch import SamplingBatch
from jaxllm.sampling.logprobs import Logprobs, gather_logprobs
from jaxllm.sampling.sampler import by_platform, in_slices, sample, sample_greedy
from jaxllm.sampling.tiles import to_tiles
from jaxllm.speculative.adaptive import AdaptiveDrafts
from jaxllm.speculative.drafter import Drafter, ReadingDrafter
from jaxllm.speculative.head_drafter import HeadCache
from pallas_kernels.batch import AttentionBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step is compiled for, besides its bucket."""

    model: DecoderConfig
    groups: tuple[KVCacheGroup, ...]
    #: alternatives whose log-probabilities a step returns when any request wants them
    num_logprobs: int
    logprobs_mode: str
    #: prompt tokens of a step whose successors' log-probabilities can be asked for
    max_scored_tokens: int
    context: Context = Context()
    #: whether steps bring vectors of prompts
    prompt_embeds: bool = False
    #: whether steps count the tokens of each expert
    expert_load: bool = False
    #: who makes drafts; None: nobody
    drafter: Drafter | None = None
    #: the user's part of the sampler
    processors: tuple[LogitsProcessor, ...] = ()
    #: rows whose logits exist at once, in a sampler that computes all the rows that it is made for; None: one slice of
    #: rows after the other, as many as the step has. A GPU's host has to wait for the number of a loop's rounds
    fixed_sample_rows: int | None = None
    #: whether programs are compiled for a CPU; None: nobody knows before they are lowered
    on_cpu: bool | None = None


#: numbers of a row in `State.drafting`
DRAFTING_COLUMNS = 2 + AdaptiveDrafts.COLUMNS
#: in `State.tokens`, at the position where a row would go on that has ended in a launch of several steps
ENDED = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the device between steps; donated to every step. R rows and M tokens of each, for which there is
    room (`RunnerConfig.row_capacity`, `context_capacity`).
    """

    cache: Cache  # of all layers
    #: i32 [R + 1, M]: every token that the device has seen of each row, at its position; the last row is trash
    tokens: jax.Array
    #: i32 [R + 1, DRAFTING_COLUMNS], of engines that check drafts: where the last launch with drafts left each row, the
    #: position of its last token, how its drafts did, and how many tokens a model that drafts has passed over
    drafting: jax.Array | None = None
    #: of the layers of a model that drafts, or of a head, under the same block tables
    draft_cache: Cache | HeadCache | None = None
    #: i32 [1, 1 + C], of engines whose drafts are made of earlier outputs: `KeptOutputs` says what lies where
    outputs: jax.Array | None = None
    #: [1 + C, d], of engines that see pictures: the vectors of encoded items; row 0 is trash
    encoded: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """Where a forward step's logits come from, after the final norm; the rest of each array is zeros."""

    sampled: jax.Array  # [R, d]: tokens to sample from
    scored: jax.Array  # [E, d]: prompt tokens whose successors' log-probabilities are wanted; E = max_scored_tokens
    #: i32 [layers with experts, experts]: the tokens that each expert got, in this step; None: nobody counts them
    load: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """A step's result; entry i belongs to the i-th sampled sequence. R as in `State`."""

    token_ids: jax.Array  # i32 [R]
    logprobs: Logprobs | None  # [R, ...]; None from the greedy-only program


def forward_step(
    config: StepConfig,
    bucket: Bucket,
    packing: Packing,
    params: Params,
    state: State,
    buffer: jax.Array,
    embeddings: jax.Array | None = None,
) -> tuple[State, Hidden, jax.Array]:
    """Compute the scheduled tokens and write their keys and values.

    Args:
        config, bucket, packing: static.
        buffer: int32, `forward_packing`'s fields, then `sample_packing`'s.
        embeddings: [T, d], of the tokens whose id is `EMBEDDED`, where the engine takes such prompts.

    Returns:
        (state, hidden, sampling): sampling is the buffer's second part, for `sample_step`.
    """
    fields = packing.unpack(buffer)
    if bucket.adapters:
        params = with_slots(params, fields["adapter_slots"], config.context.backend)
    tokens, batch = step_tokens(config, state.tokens, fields, step_attention(fields, bucket))
    if embeddings is not None:
        batch = dataclasses.replace(batch, embeddings=embeddings)
    batch = with_pictures(batch, fields, state.encoded)
    # of a model that drafts, the host decides
    reads = fields["drafter_reads"] != 0 if "drafter_reads" in fields else True
    state = dataclasses.replace(state, tokens=tokens)
    state, hidden, load, _ = compute(config, params, state, batch, drafter_reads=reads)
    wanted = dataclasses.replace(wanted_rows(config, tokens, fields, hidden), load=load)
    return state, wanted, buffer[packing.size :]


def compute(
    config: StepConfig, params: Params, state: State, batch: StepBatch, *, drafter_reads: bool | jax.Array = True
) -> tuple[State, jax.Array, jax.Array | None, jax.Array | None]:
    """A step through the model's layers, and, where a model drafts, through that one's.

    Args:
        drafter_reads: False: it has read the tokens, or will, or never; bool []: whether it reads them.

    Returns:
        (state, hidden, load, taken), the first three as `forward_keeping`; taken [T, h], what the drafter takes of
        the model; None: nothing.
    """
    drafter = config.drafter if isinstance(config.drafter, ReadingDrafter) else None
    keeps = () if drafter is None else drafter.keeps
    cache, hidden, load, kept = forward_keeping(
        config.context, config.model, config.groups, params, state.cache, batch, counts=config.expert_load, keeps=keeps
    )
    state = dataclasses.replace(state, cache=cache)
    taken = None
    if drafter is not None and drafter.takes_hidden:
        taken = hidden if kept is None else jnp.concatenate(list(kept), axis=1)
    if drafter is not None and drafter_reads is not False:

        def read(cache: Cache | HeadCache | None) -> Cache | HeadCache | None:
            return drafter.read(config.context, draft_params(params), cache, batch, taken)

        draft_cache = state.draft_cache
        if drafter_reads is True:
            draft_cache = read(draft_cache)
        else:  # a loop of one round or none, which leaves the cache in its place
            rounds = drafter_reads.astype(jnp.int32)
            draft_cache = lax.fori_loop(0, rounds, lambda _, cache: read(cache), draft_cache)
        state = dataclasses.replace(state, draft_cache=draft_cache)
    return state, hidden, load, taken


def step_tokens(
    config: StepConfig, tokens: jax.Array, fields: dict[str, jax.Array], attention: AttentionBatch
) -> tuple[jax.Array, StepBatch]:
    """`State.tokens` with what the host knows of a step's tokens, and the batch with all of them."""
    trash = tokens.shape[0] - 1
    tokens = place_known_tokens(tokens, fields, attention)
    ids, rows = fields["token_ids"], _token_rows(fields, attention, trash)
    embedded = None
    if config.prompt_embeds:
        embedded = ids == EMBEDDED
        # who looks for the row's tokens finds none there
        tokens = tokens.at[jnp.where(embedded, rows, trash), attention.positions].set(EMBEDDED)
    # `ENDED` behind an end that the host has not read of: whatever comes of it is dropped
    ids = jnp.where(ids >= 0, ids, tokens[rows, attention.positions])
    return tokens, StepBatch(tokens=ids, attention=attention, embedded=embedded)


def wanted_rows(config: StepConfig, tokens: jax.Array, fields: dict[str, jax.Array], hidden: jax.Array) -> Hidden:
    """Those of a step's hidden states [T, d] whose logits are wanted; `tokens` is `State.tokens`."""

    def rows(tokens: jax.Array, capacity: int) -> jax.Array:
        return jnp.zeros((capacity, hidden.shape[1]), hidden.dtype).at[: tokens.shape[0]].set(hidden[tokens])

    sampled = rows(fields["sampled_tokens"], tokens.shape[0] - 1)
    return Hidden(sampled=sampled, scored=rows(fields["scored_tokens"], config.max_scored_tokens))


def place_known_tokens(tokens: jax.Array, fields: dict[str, jax.Array], batch: AttentionBatch) -> jax.Array:
    """`State.tokens` with those of the step's tokens that the host knows."""
    trash = tokens.shape[0] - 1
    ids = fields["token_ids"]
    row = jnp.where(ids >= 0, _token_rows(fields, batch, trash), trash)
    return tokens.at[row, batch.positions].set(jnp.maximum(ids, 0))


def _token_rows(fields: dict[str, jax.Array], batch: AttentionBatch, trash: int) -> jax.Array:
    """i32 [T]: the row of each token's sequence."""
    return jnp.where(batch.token_valid, fields["rows"][batch.token_seq], trash)


def sample_step(
    config: StepConfig,
    rows: int,
    packing: Packing,
    params: Params,
    tokens: jax.Array,
    hidden: jax.Array,
    buffer: jax.Array,
    constraints: jax.Array | None,
) -> tuple[jax.Array, Sampled]:
    """Logits and sampling of what a forward step left. One program serves every bucket: this is why the step is two
    programs.

    Args:
        config, rows (of a slice; see `StepConfig.fixed_sample_rows`), packing: static.
        tokens: `State.tokens`, donated; the sampled ids are added to it.
        hidden: [R, d].
        buffer: int32, `sample_packing`'s fields.
        constraints: int32 [R, row_size] (`ConstraintShape`); None makes the greedy-only program.
    """
    return sample_rows(config, rows, params, tokens, hidden, packing.unpack(buffer), constraints)


def sample_rows(
    config: StepConfig,
    rows: int,
    params: Params,
    tokens: jax.Array,
    hidden: jax.Array,
    fields: dict[str, jax.Array],
    constraints: jax.Array | None,
) -> tuple[jax.Array, Sampled]:
    """`sample_step` of the fields of its buffer, for any number R of rows: in slices of rows, as many as are needed, so
    that neither padding nor a wide vocabulary costs memory.
    """
    capacity = hidden.shape[0]
    rows = min(rows, capacity)
    num_slices = (fields["num_samples"] + rows - 1) // rows
    if config.fixed_sample_rows is not None:
        num_slices = -(-rows // config.fixed_sample_rows)
        rows = min(rows, config.fixed_sample_rows)

    def one_slice(i: jax.Array, out: Sampled) -> Sampled:
        first = jnp.minimum(i * rows, capacity - rows)
        wanted = lax.dynamic_slice_in_dim(hidden, first, rows)
        if rows == 1 < capacity and config.fixed_sample_rows is not None:
            # XLA:GPU of JAX 0.10 takes the slice into the product with the head, and cannot compile that of one row
            wanted = lax.optimization_barrier(wanted)
        slots = None
        if "adapters" in fields:
            slots = lax.dynamic_slice_in_dim(fields["adapters"], first, rows) - 1
        scores = _scores_of_some(config, params, wanted, fields["num_samples"], slots)
        if constraints is None:
            new = Sampled(token_ids=sample_greedy(scores), logprobs=None)
        else:
            batch = _sampling_batch(config, fields, constraints, tokens, first, rows)
            result = sample(
                scores,
                batch,
                num_logprobs=config.num_logprobs,
                logprobs_mode=config.logprobs_mode,
                processors=config.processors,
                on_cpu=config.on_cpu,
            )
            new = Sampled(token_ids=result.token_ids, logprobs=result.logprobs)
        return jax.tree.map(lambda o, n: lax.dynamic_update_slice_in_dim(o, n, first, axis=0), out, new)

    out = Sampled(
        token_ids=jnp.zeros(capacity, jnp.int32),
        logprobs=None if constraints is None else Logprobs.zeros(capacity, config.num_logprobs, MAX_LOGPROB_TOKEN_IDS),
    )
    out = lax.fori_loop(0, num_slices, one_slice, out)
    trash = tokens.shape[0] - 1
    row = jnp.where(jnp.arange(capacity, dtype=jnp.int32) < fields["num_samples"], fields["rows"], trash)
    return tokens.at[row, fields["positions"]].set(out.token_ids, mode="drop"), out


def _scores(config: StepConfig, params: Params, hidden: jax.Array, slots: jax.Array | None) -> jax.Array:
    return logits(config.context, config.model, params, hidden, slots)


def _scores_of_some(
    config: StepConfig, params: Params, hidden: jax.Array, num_samples: jax.Array, slots: jax.Array | None
) -> jax.Array:
    """`_scores`, where a single sample may have a product of its own, and the other rows are zeros: so one program
    serves one sample and several.
    """

    def single(hidden: jax.Array) -> jax.Array:
        first = None if slots is None else slots[:1]
        return jnp.pad(_scores(config, params, hidden[:1], first), ((0, hidden.shape[0] - 1), (0, 0)))

    def every(hidden: jax.Array) -> jax.Array:
        return _scores(config, params, hidden, slots)

    if hidden.shape[0] == 1 or config.fixed_sample_rows is not None:
        return every(hidden)
    return lax.cond(num_samples == 1, single, every, hidden)


def _sampling_batch(config, fields, constraints, tokens, first, rows) -> SamplingBatch:
    def own(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, rows)

    per_row = {name: own(fields[name]) for name in ("rows", "positions", "extra_args", *FLOATS, *INTS)}
    row, length = per_row.pop("rows"), per_row.pop("positions")
    seed = jnp.stack([per_row.pop("seed_high"), per_row.pop("seed_low")], axis=1)
    flags = {name: fields[name] != 0 for name in FLAGS}
    return SamplingBatch(
        **per_row,
        **flags,
        **ConstraintShape(config.model.vocab_size).unpack(own(constraints), length),
        seed=lax.bitcast_convert_type(seed, jnp.uint32),
        position=length,
        length=length,
        history=lax.cond(
            flags["any_penalty"] | flags["any_bad_words"] | bool(config.processors),
            lambda: tokens[row],
            lambda: jnp.zeros((rows, tokens.shape[1]), tokens.dtype),
        ),
    )


def score_step(config: StepConfig, rows: int, params: Params, hidden: jax.Array, targets: jax.Array) -> Logprobs:
    """How likely the model found tokens of the prompt, in slices of rows as `sample_step`: the logits of no more than
    one slice exist at once, however long the prompt is.

    Args:
        config, rows (of a slice): static.
        hidden: [E, d], `Hidden.scored`.
        targets: int32 [1 + E]: how many rows count, then the token that follows each; where adapters may have heads,
            [1 + 2 E], then one more than the slot of each.

    Returns:
        [E, ...]: `sampled` and `rank` are the target's.
    """
    capacity = hidden.shape[0]
    rows = min(rows, capacity, config.fixed_sample_rows or rows)
    normalize = config.logprobs_mode.endswith("logprobs")

    def gather(scores: jax.Array, target: jax.Array) -> Logprobs:
        return gather_logprobs(scores, target, config.num_logprobs, normalize=normalize)

    def one_slice(i: jax.Array, out: Logprobs) -> Logprobs:
        first = jnp.minimum(i * rows, capacity - rows)
        slots = None
        if targets.shape[0] > 1 + capacity:
            slots = lax.dynamic_slice_in_dim(targets, 1 + capacity + first, rows) - 1
        scores = to_tiles(_scores(config, params, lax.dynamic_slice_in_dim(hidden, first, rows), slots))
        target = lax.dynamic_slice_in_dim(targets, 1 + first, rows)
        new = by_platform(config.on_cpu, lambda *args: in_slices(gather, *args), gather, scores, target)
        return jax.tree.map(lambda o, n: lax.dynamic_update_slice_in_dim(o, n, first, axis=0), out, new)

    return lax.fori_loop(0, (targets[0] + rows - 1) // rows, one_slice, Logprobs.zeros(capacity, config.num_logprobs))


def write_tokens(tokens: jax.Array, buffer: jax.Array) -> jax.Array:
    """Put known tokens into a row of `State.tokens` without computing them: buffer int32 [3 + N] is (row, position,
    count, ids).
    """
    row, position, count, ids = buffer[0], buffer[1], buffer[2], buffer[3:]
    lane = jnp.arange(ids.shape[0], dtype=jnp.int32)
    target = jnp.where(lane < count, position + lane, tokens.shape[1])
    return tokens.at[row, target].set(ids, mode="drop")
