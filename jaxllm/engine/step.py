"""What the engine (host) and the runner (device) say to each other. No jax here.

The engine decides, in terms of *rows*: every running request owns one row in ``[0, max_num_seqs)`` from its admission
to its end. The runner keeps per-row state (block tables, sampling parameters, token ids) and turns a `SchedulerOutput`
into one launch of the compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


#: what a step's constraint buffer holds for one request: logit biases (OpenAI's limit is 300), banned sequences of
#: several tokens
MAX_BIASES = 320
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
#: ids that end a request on the device, in a launch of several steps
MAX_END_TOKEN_IDS = 8


@dataclasses.dataclass(slots=True, kw_only=True)
class AdmittedRequest:
    """A request that enters a row: new, or resumed after a preemption."""

    row: int
    request_id: str
    #: every token known so far: prompt, then the outputs of a resumed request
    token_ids: list[int]
    num_prompt_tokens: int
    #: tokens whose keys and values are in the cache already (prefix hits)
    num_computed_tokens: int
    #: `SamplingParams`; `PoolingParams` for a runner that pools
    params: Any
    #: the request's own seed, decided by the engine when the user gave none
    seed: int
    #: ids that end generation; masked while fewer than `min_tokens` outputs exist
    stop_token_ids: frozenset[int]
    #: one list of block ids per KV-cache group
    block_ids: tuple[list[int], ...]
    #: token sequences that must not be generated (`SamplingParams.bad_words`, tokenized)
    bad_words: tuple[tuple[int, ...], ...] = ()
    #: those of `stop_token_ids` that do end it: all but EOS under `ignore_eos`
    end_token_ids: frozenset[int] = frozenset()


@dataclasses.dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step's work. `rows`, `starts`, `counts`, `samples` and `scored` are parallel lists, one entry a scheduled
    request.

    Entry i computes the tokens at positions ``starts[i] .. starts[i] + counts[i] - 1`` of the request in ``rows[i]``,
    and, when ``samples[i]``, samples the token at position ``starts[i] + counts[i]``. A token that the host does not
    know yet is one that an earlier step sampled: the runner finds it on the device. The first ``scored[i]`` of the
    positions also say how likely they found the token that follows them, which is a token of the prompt.

    With `steps`, one launch does several decode steps: each entry has one token, ``counts[i] == 1``, samples the next,
    goes on with that, and so on, up to ``steps[i]`` tokens in all. It ends early where it samples one of its
    `end_token_ids`, and does nothing if an earlier launch came upon its end, which the host did not know yet.
    """

    step: int
    admitted: list[AdmittedRequest]
    rows: list[int]
    starts: list[int]
    counts: list[int]
    samples: list[bool]
    #: together at most `SchedulerConfig.max_scored_tokens`
    scored: list[int]
    #: (row, group, index of the first new block in the row's table, block ids) appended this step to rows already
    #: admitted
    new_blocks: list[tuple[int, int, int, list[int]]]
    #: the engine's own handle of each entry; the runner passes over it
    requests: list
    #: rows that sample in this step and whose tokens the engine restricts with a mask, see `ModelRunner.sample`
    masked_rows: frozenset[int] = frozenset()
    #: tokens that each entry samples, at most; empty: a single step
    steps: list[int] = dataclasses.field(default_factory=list)
    #: of `requests`, those that may end for another reason than the token that they sample; the runner passes over it
    ending: list = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, step: int) -> SchedulerOutput:
        return cls(
            step=step, admitted=[], rows=[], starts=[], counts=[], samples=[], scored=[], new_blocks=[], requests=[]
        )

    @property
    def num_tokens(self) -> int:
        """Of a step; of the first one where a launch does several."""
        return sum(self.counts)

    @property
    def num_steps(self) -> int:
        return max(self.steps, default=1)

    def step_sizes(self) -> list[int]:
        """Tokens of each of the steps, as far as the host can know."""
        if not self.steps:
            return [self.num_tokens]
        return [sum(steps > index for steps in self.steps) for index in range(self.num_steps)]


@dataclasses.dataclass(slots=True, kw_only=True)
class LogprobArrays:
    """Log-probabilities of N positions: of the token that is there, of the most likely ones, of those asked for."""

    sampled: np.ndarray  # f32 [N]
    rank: np.ndarray  # i32 [N], 1 = the most likely token
    top_ids: np.ndarray  # i32 [N, K], most likely first
    top: np.ndarray  # f32 [N, K]
    #: f32 [N, MAX_LOGPROB_TOKEN_IDS]: of the request's `logprob_token_ids`, in their order; None: no request has any
    chosen: np.ndarray | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class StepOutput:
    token_ids: list[int]  # one per entry of the SchedulerOutput; -1 where nothing was sampled, or nothing was allowed
    #: of a launch of several steps: the same of each step after the first, -1 too for entries that had ended before it
    later_token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    #: N = the entries of the SchedulerOutput
    logprobs: LogprobArrays | None = None
    #: N = the scored positions, entry after entry, each entry's in ascending order; `sampled` is the prompt's token
    prompt_logprobs: LogprobArrays | None = None
    #: of a pooling engine, one per entry: f32 [size], or [tokens, size] for a token task; None where nothing ended
    pooled: list[np.ndarray | None] | None = None


class StepFuture(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step and read what it sampled."""
        ...


class ModelRunner(Protocol):
    """All that the engine knows of the device."""

    def execute(self, scheduled: SchedulerOutput) -> StepFuture:
        """Launch one step, or several at once; does not wait for it."""
        ...

    def forward(self, scheduled: SchedulerOutput) -> Any:
        """Launch a step's first part, which computes the scheduled tokens; does not wait for it.

        The returned handle goes to `sample`, before any other step is launched. Meanwhile the engine may read earlier
        steps, and find out what this one's `masked_rows` may sample.
        """
        ...

    def sample(self, launched: Any, masks: Mapping[int, np.ndarray]) -> StepFuture:
        """Launch the second part of a step, which samples.

        Args:
            masks: masked row -> int32 [ceil(vocab_size / 32)]: token t is allowed when bit t % 32 of word t // 32 is
                set. A masked row without a mask may sample anything.
        """
        ...

    def reset(self) -> None:
        """Make the device state usable again after a failed step; the cache's contents are lost."""
        ...

    def free_cache(self) -> None:
        """Free the device state; `reset` makes it anew."""
        ...

    def free_weights(self, *, keep_on_host: bool) -> None:
        """Free the weights' memory on the device."""
        ...

    def restore_weights(self) -> None:
        """Undo `free_weights`: from the host, or from where they were first read."""
        ...

    def shutdown(self) -> None:
        """Free every device array."""
        ...
