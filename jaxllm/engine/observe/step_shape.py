"""What a step does, as far as it decides how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxllm.engine.step import SchedulerOutput


class StepShape(NamedTuple):
    """Of a launch of several steps, sums over them, but for `num_tokens` and `num_requests`."""

    #: of the compiled program, those of its padding included
    num_tokens: int
    num_requests: int
    #: positions that get logits
    num_logits: int
    #: tokens that those attend to which are alone in the step of their request, added up
    decode_context: int
    #: pairs of a token and one that it attends to, of requests that compute several
    chunk_pairs: int
    num_steps: int = 1

    @classmethod
    def of(cls, step: SchedulerOutput, num_tokens: int) -> StepShape:
        """Of a launch without drafts, in a program of so many tokens."""
        starts, counts, rows = step.starts, step.counts, len(step.rows)
        if step.num_steps > 1:
            # token i of a request attends to all before it and itself, too
            context = sum(start * count + count * (count + 1) // 2 for start, count in zip(starts, counts, strict=True))
            return cls(num_tokens, rows, sum(counts), context, 0, step.num_steps)
        if sum(counts) == rows:
            return cls(num_tokens, rows, sum(step.wanted), sum(starts) + rows, 0)
        # of a chunk of c tokens from position s on, token i attends to s + i + 1
        several = [(start, count) for start, count in zip(starts, counts, strict=True) if count > 1]
        attended = sum(start * count + count * (count + 1) // 2 for start, count in several)
        alone = sum(starts) - sum(start for start, _ in several) + rows - len(several)
        return cls(num_tokens, rows, sum(step.wanted), alone, attended)
