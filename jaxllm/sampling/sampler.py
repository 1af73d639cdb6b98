"""From a step's logits to its tokens, inside the compiled step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.api.logits_processor import LogitsProcessor
from jaxllm.sampling import tiles
from jaxllm.sampling.batch import SamplingBatch
from jaxllm.sampling.constraints import apply_bad_words, apply_bias, apply_mask
from jaxllm.sampling.distribution import Cut, Distribution
from jaxllm.sampling.draw import draw_nucleus, invert, uniforms
from jaxllm.sampling.logprobs import MODES, Logprobs, gather_logprobs
from jaxllm.sampling.penalties import apply_penalties
from jaxllm.sampling.processors import apply_processors
from jaxllm.sampling.truncation import Head, head_of, top_k_cut, top_p_cut

# Rows that are computed together on CPU.
ROWS = 8

Result = TypeVar("Result")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleResult:
    #: i32[R]
    token_ids: jax.Array
    #: zeros when the batch's `want_logprobs` is False
    logprobs: Logprobs


def sample_greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, the lowest id among equals.

    Args:
        logits: f32[R, V].

    Returns:
        i32[R]. 0 for a row that holds a NaN or nothing but -inf.
    """
    return tiles.argmax(tiles.to_tiles(logits))[1]


def sample(
    logits: jax.Array,
    batch: SamplingBatch,
    *,
    num_logprobs: int,
    logprobs_mode: str = "raw_logprobs",
    processors: Sequence[LogitsProcessor] = (),
    on_cpu: bool | None = None,
) -> SampleResult:
    """Sample one token per row, in vLLM V1's order.

    Allowed-token mask, bad words, logit bias, the user's processors, penalties; then the most likely token (temperature
    0), or temperature, min_p, top_k, top_p of what is left, and a draw. On CPU a row's token and log-probabilities
    depend on it alone, to the bit.

    Args:
        logits: f32[R, V].
        batch: of R rows.
        num_logprobs: of how many most likely tokens to return log-probabilities beside the sampled one's, 0 to V.
        logprobs_mode: raw_* = before any of the above, processed_* = after all of it (greedy rows have a temperature of
            1 there); *_logprobs = normalised, *_logits = as they are.
        processors: the user's own; they need the batch's `history` and `extra_args`.
        on_cpu: whether it is compiled for a CPU; None: that is found out when it is lowered, and it is traced twice.

    Returns:
        Tokens and log-probabilities. A row that holds a NaN, or in which nothing is allowed, gets token 0.

    Raises:
        ValueError: for an unknown mode, more log-probabilities than tokens, or a mask of another vocabulary.
    """
    vocab = logits.shape[1]
    if logprobs_mode not in MODES:
        raise ValueError(f"logprobs_mode is {logprobs_mode!r}; it must be one of {', '.join(MODES)}.")
    if not 0 <= num_logprobs <= vocab:
        raise ValueError(f"num_logprobs is {num_logprobs}; it must be between 0 and the vocabulary's size, {vocab}.")
    words = batch.mask_words.shape[1]
    if words not in (0, -(-vocab // 32)):
        raise ValueError(
            f"mask_words has {words} words a row; {vocab} tokens need {-(-vocab // 32)} (or 0 for no masks)."
        )

    def rows_at_once(logits: jax.Array, batch: SamplingBatch) -> SampleResult:
        return sample_rows(logits, batch, num_logprobs, logprobs_mode, processors)

    def some_rows(logits: jax.Array, batch: SamplingBatch) -> SampleResult:
        return rows_at_once(logits, batch.narrowed())

    return by_platform(on_cpu, lambda *args: in_slices(some_rows, *args), rows_at_once, logits, batch)


def by_platform(
    on_cpu: bool | None, of_cpu: Callable[..., Result], of_others: Callable[..., Result], *args: Any
) -> Result:
    """What a CPU or another device computes of the arguments; None: whichever it is lowered for."""
    if on_cpu is None:
        return lax.platform_dependent(*args, cpu=of_cpu, default=of_others)
    return (of_cpu if on_cpu else of_others)(*args)


def in_slices(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)``, eight rows at a time, so that every row is always computed by the same code.

    Args:
        args: trees of arrays [R, ...], the first one's first leaf among them, and of scalars, which every slice gets.

    Returns:
        Arrays [R, ...].

    XLA:CPU compiles one expression to different arithmetic for different shapes (the order of a sum, the evaluation of
    an exponential), so without this a row's bits would depend on the number of rows. It is also as fast or faster: the
    logits of eight rows stay in the cache, and only the slices that need a feature pay for it.
    """
    leaves, structure = jax.tree.flatten(args)
    rows = leaves[0].shape[0]

    def split(leaf: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf, ((0, -rows % ROWS), *[(0, 0)] * (leaf.ndim - 1))) if rows % ROWS else leaf
        return padded.reshape(padded.shape[0] // ROWS, ROWS, *leaf.shape[1:])

    is_row = [leaf.ndim > 0 for leaf in leaves]

    def one(row_leaves: list[jax.Array]) -> Result:
        following = iter(row_leaves)
        every = [next(following) if row else leaf for leaf, row in zip(leaves, is_row, strict=True)]
        return function(*jax.tree.unflatten(structure, every))

    result = lax.map(one, [split(leaf) for leaf, row in zip(leaves, is_row, strict=True) if row])
    return jax.tree.map(lambda leaf: lax.collapse(leaf, 0, 2)[:rows], result)


def sample_rows(
    logits: jax.Array,
    batch: SamplingBatch,
    num_logprobs: int,
    logprobs_mode: str = "raw_logprobs",
    processors: Sequence[LogitsProcessor] = (),
) -> SampleResult:
    """`sample` with all rows at once, which suits an accelerator; arguments must be valid."""
    rows, vocab = logits.shape
    processed = tiles.to_tiles(_adjust(logits, batch, processors))
    peak, greedy = tiles.argmax(processed)
    random = (batch.temperature > 0.0) & (peak > -jnp.inf)
    distribution = Distribution(
        logits=processed,
        peak=peak,
        temperature=jnp.where(random, batch.temperature, 1.0),
        log_min_p=jnp.where(random, jnp.log(batch.min_p), -jnp.inf),
    )
    token = lax.cond(
        batch.any_random & jnp.any(random),
        lambda: _draw_rows(distribution, batch, random, greedy, vocab),
        lambda: greedy,
    )

    def logprobs() -> Logprobs:
        if logprobs_mode.startswith("raw"):
            values = tiles.to_tiles(logits)
        else:
            values = lax.cond(
                batch.any_random, lambda: _remaining_logits(distribution, batch, random, vocab), lambda: processed
            )
        normalize = logprobs_mode.endswith("logprobs")
        return gather_logprobs(values, token, num_logprobs, normalize=normalize, chosen_ids=batch.logprob_ids)

    nothing = Logprobs.zeros(rows, num_logprobs, batch.logprob_ids.shape[1])
    return SampleResult(token_ids=token, logprobs=lax.cond(batch.want_logprobs, logprobs, lambda: nothing))


def _adjust(logits: jax.Array, batch: SamplingBatch, processors: Sequence[LogitsProcessor]) -> jax.Array:
    """f32[R, V]: everything that changes single logits. One branch around all, as each branch may copy the logits."""
    has_mask = batch.mask_words.shape[1] > 0
    has_bad_words = batch.bad_words.size > 0 and batch.history.shape[1] > 0
    has_bias = batch.bias_ids.shape[1] > 0
    has_penalty = batch.history.shape[1] > 0

    def adjusted() -> jax.Array:
        values = logits
        if has_mask:
            values = lax.cond(batch.any_mask, lambda x: apply_mask(x, batch.mask_words, batch.use_mask), _same, values)
        if has_bad_words:
            values = lax.cond(
                batch.any_bad_words,
                lambda x: apply_bad_words(x, batch.bad_words, batch.history, batch.prompt_length, batch.length),
                _same,
                values,
            )
        if has_bias:
            values = lax.cond(batch.any_bias, lambda x: apply_bias(x, batch.bias_ids, batch.bias_values), _same, values)
        if processors:
            values = apply_processors(values, batch, processors)
        if has_penalty:
            values = lax.cond(batch.any_penalty, lambda x: apply_penalties(x, batch), _same, values)
        return values

    if processors:
        return adjusted()
    if not (has_mask or has_bad_words or has_bias or has_penalty):
        return logits
    wanted = batch.any_mask | batch.any_bad_words | batch.any_bias | batch.any_penalty
    return lax.cond(wanted, adjusted, lambda: logits)


def _same(logits: jax.Array) -> jax.Array:
    return logits


def _limit(batch: SamplingBatch, vocab: int, size: int) -> jax.Array:
    """i32[R]: top-k as a number of tokens; `size`, the padded vocabulary, for none."""
    return jnp.where((batch.top_k > 0) & (batch.top_k < vocab), batch.top_k, size)


def _draw_rows(
    distribution: Distribution, batch: SamplingBatch, random: jax.Array, greedy: jax.Array, vocab: int
) -> jax.Array:
    """i32[R]: a draw for every random row, the greedy token for the others.

    Three ways, chosen by each row for itself, so that the others in its batch cannot change its result: among the
    head's tokens when the head holds all that truncation leaves; from the whole vocabulary when nothing is truncated;
    from the whole vocabulary with a border that must be searched. What no row needs is skipped.
    """
    rows = random.shape[0]
    size = distribution.logits.shape[1] * tiles.TILE
    limit = _limit(batch, vocab, size)
    unlimited = limit == size
    everything = Cut.none(rows)

    def truncating() -> tuple[jax.Array, jax.Array, jax.Array]:
        truncated = random & batch.truncated
        head = head_of(distribution, limit)
        sums = maybe_sums(random & ~(truncated & head.closed))
        kept, known = head.nucleus(batch.top_p, jnp.where(unlimited, jnp.sum(sums, axis=-1), jnp.inf))
        by_head = truncated & known
        return _draw_from_head(head, kept, batch), by_head, sums

    def whole() -> tuple[jax.Array, jax.Array, jax.Array]:
        return greedy, jnp.zeros((rows,), bool), distribution.tile_sums(everything)

    def maybe_sums(needed: jax.Array) -> jax.Array:
        return lax.cond(
            jnp.any(needed),
            lambda: distribution.tile_sums(everything),
            lambda: jnp.zeros(distribution.logits.shape[:2], jnp.float32),
        )

    token, by_head, sums = lax.cond(batch.any_truncation, truncating, whole)
    searched = random & ~by_head

    def searching() -> jax.Array:
        by_count = searched & ~unlimited

        def limited() -> tuple[Cut, jax.Array]:
            found = top_k_cut(distribution.logits, limit, by_count)
            cut = jax.tree.map(lambda a, b: jnp.where(by_count, a, b), found, everything)
            return cut, jnp.where(by_count[:, None], distribution.tile_sums(cut), sums)

        cut, cut_sums = lax.cond(jnp.any(by_count), limited, lambda: (everything, sums))
        top_p = jnp.where(searched, batch.top_p, 1.0)
        return draw_nucleus(distribution, cut_sums, cut, top_p, batch.seed, batch.position)

    searched_token = lax.cond(jnp.any(searched), searching, lambda: greedy)
    return jnp.where(by_head, token, jnp.where(searched, searched_token, greedy))


def _draw_from_head(head: Head, kept: jax.Array, batch: SamplingBatch) -> jax.Array:
    """i32[R]: a draw among the first `kept` (i32[R]) tokens of the head."""
    within = lax.iota(jnp.int32, head.ids.shape[1]) < kept[:, None]
    index = invert(jnp.where(within, head.weights, 0.0), uniforms(batch.seed, batch.position, 0)[:, 0])
    return jnp.take_along_axis(head.ids, index[:, None], axis=1, mode="clip")[:, 0]


def _remaining_logits(distribution: Distribution, batch: SamplingBatch, random: jax.Array, vocab: int) -> jax.Array:
    """f32[R, N, 64]: logits / temperature of the tokens that truncation leaves, -inf for the others."""
    logits = distribution.logits
    limit = _limit(batch, vocab, logits.shape[1] * tiles.TILE)
    size = logits.shape[1] * tiles.TILE
    everything = Cut.none(random.shape[0])
    by_count = random & (limit < size)
    by_mass = random & (batch.top_p < 1.0)
    cut = _where(by_count, top_k_cut(logits, limit, by_count), everything)
    cut = _where(by_mass, top_p_cut(distribution, cut, batch.top_p, by_mass), cut)
    keep = cut.keeps(logits, tiles.token_ids(logits)) & (
        distribution.scaled(logits) >= distribution.log_min_p[:, None, None]
    )
    return jnp.where(keep, logits / distribution.temperature[:, None, None], -jnp.inf)


def _where(rows: jax.Array, cut: Cut, other: Cut) -> Cut:
    return jax.tree.map(lambda a, b: jnp.where(rows, a, b), cut, other)
