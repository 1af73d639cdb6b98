"""What the few buckets of ``enforce_eager=True`` cost on a CPU, where a step's time grows with its padding."""

from __future__ import annotations

import logging

from jaxllm.runner.buckets import Bucket, pick_bucket

logger = logging.getLogger("jaxllm")

#: Reading the weights takes a CPU as long as computing so many tokens: with SmolLM2-135M, a step of one token takes
#: 74 ms and one of 32 takes 435 ms.
FIXED_TOKENS = 6
#: steps before anything is said: a single long prompt says nothing about the rest
STEPS = 32
#: times the cost without enforce_eager that is worth a warning
FACTOR = 2


class PaddingCost:
    """Compares the steps of an engine with what they would cost in all buckets, and warns once.

    Args:
        buckets: those that the engine has.
        ordinary: those that it would have without ``enforce_eager``.
    """

    def __init__(self, buckets: tuple[Bucket, ...], ordinary: tuple[Bucket, ...]):
        self._buckets, self._ordinary = buckets, ordinary
        self._steps = self._spent = self._needed = 0
        self._told = False

    def count(self, tokens: int, seqs: int) -> None:
        """Take a step of so many tokens of so many sequences into account."""
        if self._told:
            return
        self._steps += 1
        self._spent += FIXED_TOKENS + pick_bucket(self._buckets, tokens, seqs).tokens
        self._needed += FIXED_TOKENS + pick_bucket(self._ordinary, tokens, seqs).tokens
        if self._steps >= STEPS and self._spent > FACTOR * self._needed:
            self._told = True
            sizes = ", ".join(str(bucket.tokens) for bucket in self._buckets)
            logger.warning(
                "enforce_eager=True costs about %.1f times the time here: %d steps were padded to one of %s tokens. "
                "Leave it out: more programs are compiled at the first start, and kept for those after it.",
                self._spent / self._needed,
                self._steps,
                sizes,
            )
