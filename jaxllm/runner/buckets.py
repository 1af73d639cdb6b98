"""Shapes that steps are compiled for."""

from __future__ import annotations

from typing import NamedTuple


class Bucket(NamedTuple):
    """A step of up to `tokens` tokens of up to `seqs` sequences."""

    tokens: int
    seqs: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.seqs} seqs"


def make_buckets(max_num_batched_tokens: int, max_num_seqs: int, *, eager: bool = False) -> tuple[Bucket, ...]:
    """Buckets in ascending order, the last one holding the largest step.

    One token, then powers of two from 8: padding at most doubles a step of more. A bucket takes as many sequences as
    it can hold: what is done for each sequence (attention, sampling) has a true length inside the step, so padded
    sequences cost nothing.

    Args:
        eager: only two buckets, a small and the largest one: quick start, slower steps.
    """
    sizes = {1, max_num_batched_tokens}
    size = 8
    while size < max_num_batched_tokens:
        sizes.add(size)
        size *= 2
    if eager:
        sizes = {min(s for s in sizes if s >= min(32, max_num_batched_tokens)), max_num_batched_tokens}
    return tuple(Bucket(tokens, min(tokens, max_num_seqs)) for tokens in sorted(sizes))


def pick_bucket(buckets: tuple[Bucket, ...], tokens: int, seqs: int) -> Bucket:
    """The smallest bucket that holds the step. Raises ValueError when none does: the scheduler's budget is wrong."""
    for bucket in buckets:
        if bucket.tokens >= tokens and bucket.seqs >= seqs:
            return bucket
    raise ValueError(f"no bucket holds {tokens} tokens of {seqs} sequences; the largest is {buckets[-1]}")
