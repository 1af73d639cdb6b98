"""How long steps take, learnt from steps that were measured.

A step's time is a sum: what every step takes, what each token of the program does, rows of logits, and what is attended
to. Programs are of few sizes, and are made differently for few tokens and for many, so each size that was measured may
have a time of its own above that of the smaller ones. Logits are computed in blocks of rows, each of which costs its
size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.step_shape import StepShape
from jaxllm.runner.capacities import SAMPLE_ROWS_CPU

#: steps that are fitted, at least
FEWEST_STEPS = 8
#: how much likelier a line through all sizes is than a time of its own for each: the weight of a size's own time in the
#: sum of squares, relative to a step's
_OWN_TIME = 0.03
#: rounds of reweighting; a share by which a step's time may differ before it counts less; and times of what a step
#: takes, above which it is somebody else's doing
_ROUNDS, _CLOSE, _MOST = 12, 0.02, 2.0
#: a share of a step's time that is nearly all of it
_ALL = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedSteps:
    """Seconds; none is negative."""

    #: of the device
    fixed: float
    token: float
    logit: float
    context: float
    pair: float
    #: (tokens of a program, what it takes more than the smaller ones, beside its tokens), in ascending order
    own: tuple[tuple[int, float], ...] = ()
    #: of the host
    host: float = 0.0
    host_request: float = 0.0
    num_steps: int = 0
    #: whether what is in the cache takes nearly all of a step's time, as it does in no engine with weights: the steps
    #: were too much alike, or the machine too busy, to tell one from the other
    is_vague: bool = False

    def device_seconds(self, shape: StepShape) -> float:
        size = shape.num_tokens
        own = sum([seconds for tokens, seconds in self.own if tokens <= size])
        return (
            shape.num_steps * (self.fixed + own + self.token * size)
            + self.logit * shape.num_steps * _rows(shape.num_logits / shape.num_steps)
            + self.context * shape.decode_context
            + self.pair * shape.chunk_pairs
        )

    def host_seconds(self, num_requests: int) -> float:
        return self.host + self.host_request * num_requests

    def __str__(self) -> str:
        return (
            f"a step takes {1e3 * self.fixed:.2f} ms, {1e6 * self.token:.1f} us a token, {1e9 * self.context:.1f} ns a "
            f"token in the cache; fitted to {self.num_steps} steps"
            + ", too much alike to tell what takes the time: of other settings expect anything"
            * self.is_vague
        )

    @classmethod
    def of(cls, steps: Mapping[str, np.ndarray]) -> FittedSteps:
        """The one with the least relative errors over a trace's steps, in the sense of the median (`_least_errors`).

        Args:
            steps: `Trace.arrays`.

        Raises:
            ValidationError: there are fewer than `FEWEST_STEPS` steps.
        """
        kept = _usable(steps)
        if kept.any() and not steps["num_logits"][kept].any():
            raise ValidationError("the trace does not say what its steps attended to: take one with this version.")
        if kept.sum() < FEWEST_STEPS:
            raise ValidationError(f"the trace has {int(kept.sum())} steps to learn from; {FEWEST_STEPS} are needed.")
        return cls._fit({name: values[kept] for name, values in steps.items()})

    @classmethod
    def of_halves(cls, steps: Mapping[str, np.ndarray]) -> tuple[FittedSteps, FittedSteps]:
        """Fitted to one half of the steps, and to the other one: runs of steps alternate.

        Raises:
            ValidationError: as `of` does, of each half.
        """
        numbers = np.arange(len(steps["device_time"])) * 2 // FEWEST_STEPS
        halves = [{name: values[numbers % 2 == odd] for name, values in steps.items()} for odd in (0, 1)]
        return cls.of(halves[0]), cls.of(halves[1])

    @classmethod
    def _fit(cls, steps: Mapping[str, np.ndarray]) -> FittedSteps:
        times, launches = steps["device_time"], steps["num_steps"]
        sizes = np.where(steps["bucket_tokens"] > 0, steps["bucket_tokens"], _tokens(steps))
        different = np.unique(sizes)
        thresholds = [int(size) for size in different[1:]]
        columns = [
            launches,
            sizes * launches,
            launches * np.array([_rows(count) for count in steps["num_logits"] / launches]),
            steps["decode_context"],
            steps["chunk_pairs"],
            *(launches * (sizes >= size) for size in thresholds),
        ]
        typical = float(np.median(times))
        weights = [0.0] * 5 + [_OWN_TIME / typical] * len(thresholds)
        # where no step had more than one block of logits, what it takes is a part of what every step takes
        weights[2] = _OWN_TIME * SAMPLE_ROWS_CPU[0] / typical
        found = _least_errors(times, columns, weights)
        # a trace's `device_time` begins before the launch, and has its time
        work = sum(steps[f"{part}_time"] for part in ("schedule", "update", "output"))
        host = _least_errors(np.maximum(work, 1e-9), [np.ones(len(times)), steps["num_seqs"]], [0.0, 0.0])
        fixed, token, logit, context, pair = found[:5]
        return cls(
            fixed=fixed,
            token=token,
            logit=logit,
            context=context,
            pair=pair,
            own=tuple((size, own) for size, own in zip(thresholds, found[5:], strict=True) if own > 0),
            host=host[0],
            host_request=host[1],
            num_steps=len(times),
            is_vague=context * float(np.median(steps["decode_context"])) > _ALL * typical,
        )


def _tokens(steps: Mapping[str, np.ndarray]) -> np.ndarray:
    return steps["num_prefill_tokens"] + steps["num_decode_tokens"]


def _usable(steps: Mapping[str, np.ndarray]) -> np.ndarray:
    return (steps["device_time"] > 0) & (steps["num_drafted_tokens"] == 0)


def _rows(num_logits: float) -> int:
    """Rows of the blocks in which so many logits are computed."""
    few, many = SAMPLE_ROWS_CPU
    if num_logits <= few:
        return few if num_logits > 0 else 0
    return many * math.ceil(num_logits / many)


def _least_errors(times: np.ndarray, columns: Sequence[np.ndarray], weights: Sequence[float]) -> list[float]:
    """Factors of the columns that make the times, none negative.

    A machine that others use too has steps that take far too long, and slow minutes. So half of the steps are to take
    longer than the factors say, and half less, relative to what they take: least squares (Lawson and Hanson's NNLS),
    reweighted by the errors of the round before. Then all factors are raised by what steps take longer on average.

    Args:
        weights: by which each factor is held at 0, times the square root of the steps.
    """
    matrix = np.stack([column.astype(float) for column in columns], axis=1)
    trust, factors = np.ones(len(times)), np.zeros(matrix.shape[1])
    longer = trust
    for _ in range(_ROUNDS):
        held = np.sqrt(trust.sum()) * np.diag(weights)
        held = held[np.any(held, axis=1)]
        rows = np.concatenate([matrix * (trust / times)[:, None], held])
        scales = np.maximum(np.abs(rows).max(axis=0), 1e-300)
        found, _ = nnls(rows / scales, np.concatenate([trust, np.zeros(len(held))]))
        factors = found / scales
        longer = times / np.maximum(matrix @ factors, 1e-12)
        trust = 1 / np.sqrt(np.maximum(np.abs(np.log(longer)), _CLOSE))
    return [float(value) for value in factors * np.minimum(longer, _MOST).mean()]
