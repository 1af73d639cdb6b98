"""How many drafts are worth checking, decided on the device by how often those of each request were right.

A check of k drafts takes as long as ``1 + extra`` steps of a single token, for every sequence of the step, and brings a
sequence the drafts that are right besides its token. The rule has two parts, each of a few numbers a sequence:

- **What is to be won.** A draft of a sequence is right with the probability a with which its latest ones were, if
  those before it are: so ``a + a**2 + ... + a**k`` of k drafts. Of the lengths that programs have room for, the one is
  taken whose sum over the sequences exceeds its cost most.
- **What may be lost.** Each sequence has credit (`speculative.credit`), in steps: `INITIAL` at first, or less where
  those before it have lost some, `RATE` more with each step without drafts of its own, what its right drafts won, less
  its share of what checks cost, and never more than `MOST`. Drafts are checked where those who have some can pay, with
  what others owe besides. Where no check is so cheap, one is made that costs up to `DEAREST`, if there is as much as
  `INITIAL` of everybody: what lacks is owed, and paid off before the next try. So all checks together lose no more than
  `INITIAL` of each sequence (`DEAREST` where one check costs more) and `RATE` of its steps, whatever is drafted; and
  where nothing is to be won, credit that has grown pays for another try, of the shortest kind. A check that costs as
  much as all of its drafts could win is never made.

What is kept is in integers, all of it is elementwise, and what is sampled never depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.speculative.credit import DEAREST, INITIAL, MOST, RATE

#: 1 in the fixed point of credit and of counts
ONE = 1 << 16
#: before any draft is checked, this many of so many were right
RIGHT_BEFORE, TRIED_BEFORE = 1.6, 2.0
_BEFORE = round(RIGHT_BEFORE * ONE), round(TRIED_BEFORE * ONE)
#: the part of older checks that each check leaves is ``1 - 2**-FADING``
FADING = 3

#: what a check on a CPU adds to a step, in steps, and what each of its drafts does: with weights that have no kernels
#: for a few rows, and at most, with those that have. There a step takes as long to read the weights as to multiply so
#: many rows by them (of int8: 2 rows, and 2 more for what a step has besides). Measured on two cores of an Emerald
#: Rapids with SmolLM2-135M in int8: three drafts of one sequence take 0.55, seven 2.0; of four sequences, one 0.4
#: each, three 1.1 to 2.7
CPU_CHECK, CPU_ROWS, CPU_FEW_ROWS, CPU_STEP_ROWS = 0.1, 0.8, 1.0, 4
#: what a check adds on a GPU, whatever its length. It is an assumption: both kinds of step read the same weights
GPU_CHECK = 0.1


@dataclasses.dataclass(frozen=True)
class AdaptiveDrafts:
    """The rule. S: sequences, L: lengths, K: the longest one."""

    #: drafts that checks have room for, ascending
    lengths: tuple[int, ...]

    #: numbers of a sequence: its credit, its right drafts, and those that were tried
    COLUMNS = 3

    def beginning(self, credit: jax.Array | None = None) -> jax.Array:
        """The numbers of a request without checks, i32 [COLUMNS].

        Args:
            credit: i32 [], in units of 1 / `ONE`; None: `INITIAL`.
        """
        first = round(INITIAL * ONE) if credit is None else credit
        return jnp.stack([jnp.asarray(number, jnp.int32) for number in (first, *_BEFORE)])

    def choose(
        self, numbers: jax.Array, counts: jax.Array, going_on: jax.Array, extra: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Which check the next step is.

        Args:
            numbers: i32 [S, COLUMNS].
            counts: i32 [S], drafts that there are.
            going_on: bool [S]: it takes part in the step.
            extra: i32 [L], in units of 1 / `ONE`: what a check of each length takes longer than a step of a single
                token, in such steps.

        Returns:
            (kind, counts): i32 []: 0 for no check, i for one of ``lengths[i - 1]``; i32 [S], drafts to check.
        """
        credit, right, tried = numbers.T
        drafts = going_on & (counts > 0) & (credit > 0)
        counts = jnp.where(drafts, counts, 0)
        # [S, 1 + K]: of so many drafts, how many are right
        likely = (right / jnp.maximum(tried, 1)).astype(jnp.float32)
        powers = jnp.cumprod(jnp.broadcast_to(likely[:, None], (*likely.shape, self.lengths[-1])), axis=1)
        wins = jnp.pad(jnp.cumsum(powers, axis=1), ((0, 0), (1, 0)))
        # sums over many sequences do not fit into i32
        own = jnp.where(drafts, credit, jnp.where(going_on, jnp.minimum(credit, 0), 0))
        purse, size = jnp.sum(own.astype(jnp.float32)), jnp.sum(going_on)
        may_owe = purse >= round(INITIAL * ONE) * size
        best, kind, owing = jnp.float32(0), jnp.int32(0), jnp.int32(0)
        for index, length in enumerate(self.lengths):
            checked = jnp.minimum(counts, length)
            won = jnp.take_along_axis(wins, checked[:, None], axis=1)
            price = extra[index].astype(jnp.float32) * size
            gain = jnp.sum(won) - price / ONE
            can_win = jnp.any(drafts) & (jnp.sum(checked) > price / ONE)
            can_pay, can_owe = can_win & (purse >= price), can_win & may_owe & (extra[index] <= round(DEAREST * ONE))
            owing = jnp.where((owing == 0) & can_owe, index + 1, owing)
            # nothing is to be won: a try
            kind = jnp.where((kind == 0) & can_pay, index + 1, kind)
            better = can_pay & (gain > best)
            best, kind = jnp.where(better, gain, best), jnp.where(better, index + 1, kind)
        kind = jnp.where(kind == 0, owing, kind)
        room = jnp.asarray((0, *self.lengths), jnp.int32)[kind]
        return kind.astype(jnp.int32), jnp.minimum(counts, room)

    def after(
        self,
        numbers: jax.Array,
        kind: jax.Array,
        counts: jax.Array,
        accepted: jax.Array,
        going_on: jax.Array,
        extra: jax.Array,
    ) -> jax.Array:
        """The numbers after a step: what `choose` returned, and i32 [S], how many of the drafts were right."""
        credit, right, tried = numbers.T
        drafts, size = counts > 0, jnp.sum(going_on)
        # where there is no check, nobody has drafts
        price, payers = extra[jnp.maximum(kind - 1, 0)], jnp.maximum(jnp.sum(drafts), 1)
        # the price of many sequences does not fit into i32; `choose` sees to it that a share does
        share = price // payers * size + price % payers * size // payers
        change = jnp.where(drafts, accepted * ONE - share, round(RATE * ONE))
        credit = jnp.where(going_on, jnp.minimum(credit + change, round(MOST * ONE)), credit)
        tries = accepted + (accepted < counts)
        right = jnp.where(drafts, right - (right >> FADING) + accepted * ONE, right)
        tried = jnp.where(drafts, tried - (tried >> FADING) + tries * ONE, tried)
        return jnp.stack([credit, right, tried], axis=1)


def check_lengths(platform: str, num_drafts: int) -> tuple[int, ...]:
    """Drafts that the programs of an engine have room for, ascending: a CPU takes less time for fewer, so it has halves
    as well, down to three or fewer.
    """
    lengths = [num_drafts]
    while platform == "cpu" and lengths[-1] > 1 and (len(lengths) == 1 or lengths[-1] > 3):
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))


def check_costs(
    platform: str, lengths: Sequence[int], few_rows: Sequence[bool], *, num_seqs: int = 1, draft_cost: float = 0.0
) -> np.ndarray:
    """What checks are believed to take longer than a step of a single token, before any was timed (`prices`), in units
    of 1 / `ONE` of such a step.

    Args:
        few_rows: of each length, whether its program reads the weights by kernels for a few rows.
        num_seqs: of the step.
        draft_cost: of a draft before it is checked, in steps.

    Returns:
        i32 [L].
    """
    costs = [GPU_CHECK] * len(lengths)
    if platform == "cpu":
        few = CPU_FEW_ROWS * num_seqs / (num_seqs + CPU_STEP_ROWS)
        costs = [CPU_CHECK + length * (few if has else CPU_ROWS) for length, has in zip(lengths, few_rows, strict=True)]
    costs = np.asarray(costs) + draft_cost * np.asarray(lengths)
    return np.round(costs * ONE).astype(np.int32)
