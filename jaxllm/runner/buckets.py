"""Shapes that steps are compiled for."""

from __future__ import annotations

from typing import NamedTuple

from jaxllm.runner.capacities import ROW_BLOCK


class Bucket(NamedTuple):
    """A step of up to `tokens` tokens of up to `seqs` sequences."""

    tokens: int
    seqs: int
    #: every sequence has one token; a program for these alone launches no kernels for chunks and prompts
    decode_only: bool = False
    #: tokens may have adapters; a program for those without costs nothing of it
    adapters: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.seqs} seqs{', decode only' if self.decode_only else ''}" + (
            ", adapters" if self.adapters else ""
        )


def make_buckets(
    max_num_batched_tokens: int,
    max_num_seqs: int,
    *,
    eager: bool = False,
    decode_only: bool = False,
    four_rows: bool = False,
) -> tuple[Bucket, ...]:
    """Buckets in ascending order, the last one holding the largest step.

    One token, then powers of two from 8: padding at most doubles a step of more. A bucket takes as many sequences as
    it can hold: what is done for each sequence (attention, sampling) has a true length inside the step, so padded
    sequences cost nothing.

    Args:
        max_num_seqs: that there is room for, `capacities.row_capacity`.
        eager: only three buckets, for one token, a few, and the most: quick start, slower steps. One token is the step
            of a single sequence, which on a CPU takes a sixth of the time of 32.
        decode_only: also buckets for steps that give every sequence one token, unless `eager`.
        four_rows: also one for four tokens, unless `eager`: where padding to eight costs.
    """
    decode_only = decode_only and not eager
    sizes = {1, max_num_batched_tokens}
    if four_rows and max_num_batched_tokens > 4:
        sizes.add(4)
    size = 8
    while size < max_num_batched_tokens:
        sizes.add(size)
        size *= 2
    if eager:
        sizes = {1, min(s for s in sizes if s >= min(32, max_num_batched_tokens)), max_num_batched_tokens}
    buckets = [Bucket(tokens, min(tokens, max_num_seqs)) for tokens in sizes]
    if decode_only:
        # a step of one token has one sequence
        buckets = [bucket for bucket in buckets if bucket.tokens > 1 or max_num_batched_tokens == 1]
        single = {size for size in sizes if size < max_num_seqs} | {min(max_num_seqs, max_num_batched_tokens)}
        buckets += [Bucket(size, size, decode_only=True) for size in single]
    return tuple(sorted(buckets, key=lambda bucket: (bucket.tokens, not bucket.decode_only)))


def decode_step_buckets(buckets: tuple[Bucket, ...], max_num_seqs: int) -> tuple[Bucket, ...]:
    """Buckets of launches of several steps of up to `max_num_seqs` sequences, of the sizes that single steps have."""
    sizes = sorted({bucket.seqs for bucket in buckets})
    most = next((size for size in sizes if size >= max_num_seqs), sizes[-1])
    return tuple(Bucket(size, size, decode_only=True) for size in sizes if max_num_seqs and size <= most)


def draft_buckets(max_num_seqs: int) -> tuple[Bucket, ...]:
    """Buckets of launches with drafts, of up to `max_num_seqs` sequences: powers of two, since padding costs as many
    positions as a sequence has drafts.
    """
    if not max_num_seqs:
        return ()
    powers = [1 << power for power in range((max_num_seqs - 1).bit_length() + 1)]
    if powers[-1] > ROW_BLOCK:  # no more than there are rows
        powers[-1] = -(-max_num_seqs // ROW_BLOCK) * ROW_BLOCK
    return tuple(Bucket(size, size, decode_only=True) for size in powers)


def with_adapters(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """These buckets, and behind them the same for steps with adapters."""
    return (*buckets, *(bucket._replace(adapters=True) for bucket in buckets))


def pick_bucket(buckets: tuple[Bucket, ...], tokens: int, seqs: int, *, adapters: bool = False) -> Bucket:
    """The smallest bucket that holds the step, with adapters or without. Raises ValueError when none does: the
    scheduler's budget is wrong.
    """
    for bucket in buckets:
        if bucket.adapters != adapters or (bucket.decode_only and tokens != seqs):
            continue
        if bucket.tokens >= tokens and bucket.seqs >= seqs:
            return bucket
    raise ValueError(f"no bucket holds {tokens} tokens of {seqs} sequences; the largest is {buckets[-1]}")
