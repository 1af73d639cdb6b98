"""What the engine (host) and the runner (device) say to each other. No jax here.

The engine decides, in terms of *rows*: every running request owns one row in ``[0, max_num_seqs)`` from its admission
to its end. The runner keeps per-row state (block tables, sampling parameters, token ids) and turns a `SchedulerOutput`
into one launch. `SchedulerOutput` says which positions are computed and at how many of them logits are wanted;
`StepOutput` says what came of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.engine.request import Request
    from jaxllm.multimodal.items import EncodedPart, EncoderInput, PromptMedia
    from jaxllm.structured.drafts import CheckedDrafts


#: what a step's constraint buffer holds for one request: logit biases (OpenAI's limit is 300), banned sequences of
#: several tokens
MAX_BIASES = 320
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
#: ids that end a request on the device, in a launch of several steps, and those that it keeps from coming too early
MAX_END_TOKEN_IDS = 8

#: in `AdmittedRequest.token_ids`, where the prompt has a vector and no token
EMBEDDED = -2


@dataclasses.dataclass(slots=True, kw_only=True)
class AdmittedRequest:
    """A request that enters a row: new, or resumed after a preemption."""

    row: int
    request_id: str
    #: every token known so far: prompt, then the outputs of a resumed request; `EMBEDDED` where `prompt_embeds` is
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
    #: [num_prompt_tokens, hidden size], in the dtype that the model computes in, where the prompt came so
    prompt_embeds: np.ndarray | None = None
    #: what the prompt holds besides tokens
    media: PromptMedia | None = None
    #: of its adapter, on the device; -1: it has none
    adapter_slot: int = -1
    #: of prompt and outputs, where nothing ends it earlier
    max_total_tokens: int = 0

    @classmethod
    def of(cls, request: Request, num_cached_tokens: int) -> AdmittedRequest:
        """Of a request that has its row and blocks, with the tokens that the prefix cache had."""
        token_ids, embeds = list(request.all_token_ids), request.prompt_embeds
        if embeds is not None:
            token_ids[: len(embeds)] = [EMBEDDED] * len(embeds)
        return cls(
            row=request.row,
            request_id=request.request_id,
            token_ids=token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_cached_tokens,
            params=request.params,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            end_token_ids=request.end_token_ids,
            block_ids=tuple(list(table) for table in request.block_tables),
            bad_words=request.bad_words,
            prompt_embeds=embeds,
            media=None if request.media is None else request.media.media,
            adapter_slot=request.adapter_slot,
            max_total_tokens=request.max_total_tokens,
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One launch. `rows`, `starts`, `counts` and `wanted` are parallel lists, one entry a scheduled request.

    Entry i computes the tokens at positions ``starts[i] .. starts[i] + counts[i] - 1`` of the request in ``rows[i]``,
    and wants logits at the last ``wanted[i]`` of these positions. Logits at position p are about the token at p + 1.
    Where the runner knows that token, the position is *scored*: the output says how likely the token was. Where it
    does not, the position is *sampled*, and the output brings the token. The runner knows the tokens that the row was
    admitted with, ``AdmittedRequest.token_ids``, and nothing behind them, so a wanted position p is sampled when
    ``p + 1 >= len(token_ids)`` and scored otherwise.

    A computed token that the row was not admitted with is one that an earlier launch sampled: the runner finds it on
    the device. Only in a launch that `goes_on_alone` may it also be one that this launch samples itself: there every
    position is wanted and sampled, what is sampled at a position is the input of the next, and the request goes on for
    up to ``counts[i]`` tokens. It ends early where it samples one of its `end_token_ids`, and does nothing if an
    earlier launch came upon its end, which the host did not know yet.

    Examples, for a request admitted with a prompt of 10 tokens::

        what                                          start  count  wanted  result
        middle chunk of the prompt                        0      4       0  nothing
        last chunk of the prompt                          4      6       1  samples the token at position 10
        decode, its input read or not                    10      1       1  samples the token at position 11
        the same, prompt log-probabilities, first chunk   0      4       4  scores the tokens at positions 1 .. 4
        the same, last chunk                              4      6       6  scores 5 .. 9, samples 10
        4 decode steps in one launch (num_steps 4)       10      4       4  samples 11 .. 14, or fewer up to an end
        resumed with 3 outputs: admitted with 13 tokens   0     13       1  samples the token at position 13
        the same, a prefix hit of 8 tokens                8      5       1  samples the token at position 13
        2 drafts, which the device makes (num_drafts 2)  10      3       3  samples 11, and 12, 13 as far as the
                                                                            drafts for 11, 12 were right
        the same, before that was read (resumes)         13      3       3  samples up to 3 behind those
        a request that pools, middle chunk                0      4       0  nothing
        the same, last chunk                              4      6       1  the pooled result
    """

    step: int
    admitted: list[AdmittedRequest]
    rows: list[int]
    starts: list[int]
    #: tokens that each entry computes, at least 1
    counts: list[int]
    #: positions with logits, 0 to ``counts[i]``; those that are scored are at most `SchedulerConfig.max_scored_tokens`
    #: in all entries together
    wanted: list[int]
    #: (row, group, index of the first new block in the row's table, block ids) appended this step to rows already
    #: admitted
    new_blocks: list[tuple[int, int, int, list[int]]]
    #: the engine's own handle of each entry; the runner passes over it
    requests: list
    #: rows that sample in this step and whose tokens the engine restricts with a mask, see `ModelRunner.sample`
    masked_rows: frozenset[int] = frozenset()
    #: 1, or the decode steps that the launch does one after the other: the largest of `counts`, without drafts
    num_steps: int = 1
    #: most drafts of a step, which the device makes and checks: each entry gets up to ``num_steps * (1 + num_drafts)``
    #: tokens, no more than its `counts`, and at least one unless it ends. 0: there are none
    num_drafts: int = 0
    #: with drafts: others, which have prompts to compute, take no part
    is_apart: bool = False
    #: with drafts, masked row -> the drafts that are checked of it, instead of any of the device's, in one step
    checked: dict[int, CheckedDrafts] = dataclasses.field(default_factory=dict)
    #: with drafts, of each entry: an earlier launch with drafts has not been read, so that `starts` is the furthest
    #: that the request can have come, and the device knows how far it is
    resumes: list[bool] = dataclasses.field(default_factory=list)
    #: without drafts: no more requests run or wait than may have some
    may_draft: bool = True
    #: what requests got that have ended since the last step, where drafts are made of it
    #: (`SchedulerConfig.keeps_outputs`)
    ended_outputs: list[list[int]] = dataclasses.field(default_factory=list)
    #: (block id, block of the host's pool): contents that the launch copies to the host before anything is written, and
    #: that are there when its result has been read
    copies_out: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    #: the same, of contents that it copies from the host into blocks, behind those copies and before it computes; no
    #: block of the host is in both
    copies_in: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    #: items that the launch encodes before it computes anything else
    encoder_inputs: list[EncoderInput] = dataclasses.field(default_factory=list)
    #: where the vectors of items are, of requests that run in this launch and later ones
    encoded_parts: list[EncodedPart] = dataclasses.field(default_factory=list)

    #: (slot, matrices of an adapter) that the launch puts there before it computes anything
    adapter_loads: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    #: whether any of the requests has an adapter
    uses_adapters: bool = False

    @classmethod
    def empty(cls, step: int) -> SchedulerOutput:
        return cls(step=step, admitted=[], rows=[], starts=[], counts=[], wanted=[], new_blocks=[], requests=[])

    @property
    def num_tokens(self) -> int:
        """Tokens that the launch computes, of all its steps."""
        return sum(self.counts)

    @property
    def goes_on_alone(self) -> bool:
        """Whether the device takes tokens that the launch samples for inputs of the launch itself."""
        return self.num_steps > 1 or self.num_drafts > 0

    def step_sizes(self) -> list[int]:
        """Tokens of each of the launch's steps, as far as the host can know; the first decides the bucket."""
        if self.num_drafts:
            return [len(self.rows) * (1 + self.num_drafts)] * self.num_steps
        if self.num_steps == 1:
            return [self.num_tokens]
        return [sum(count > index for count in self.counts) for index in range(self.num_steps)]


@dataclasses.dataclass(slots=True, kw_only=True)
class LogprobArrays:
    """Log-probabilities of N positions: of the token that follows, of the most likely ones, of those asked for."""

    sampled: np.ndarray  # f32 [N]
    rank: np.ndarray  # i32 [N], 1 = the most likely token
    top_ids: np.ndarray  # i32 [N, K], most likely first
    top: np.ndarray  # f32 [N, K]
    #: f32 [N, MAX_LOGPROB_TOKEN_IDS]: of the request's `logprob_token_ids`, in their order; None: no request has any
    chosen: np.ndarray | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class StepOutput:
    """What a launch brought. Flat lists hold entry after entry of the SchedulerOutput, and of each entry position after
    position.

    Example: entries (start, count, wanted) of (4, 6, 6), which scores 5 and samples, (0, 8, 0) and a decode (20, 1, 1)
    give ``counts == [1, 0, 1]``, two `token_ids`, `logprobs` with N = 2 if any request wants them,
    ``scored_counts == [5, 0, 0]`` and `prompt_logprobs` with N = 5.
    """

    #: the sampled tokens of all entries
    token_ids: list[int]
    #: how many of them each entry got, one per entry of the SchedulerOutput. A request that was still to go on and gets
    #: fewer than its sampled positions (with drafts: none) without one of its `end_token_ids` had no token left that it
    #: may generate.
    counts: list[int]
    #: N = the sampled tokens, in the order of `token_ids`; None: nobody wants them
    logprobs: LogprobArrays | None = None
    #: N = the scored positions; `sampled` and `rank` are those of the token that is there; None: nothing was scored
    prompt_logprobs: LogprobArrays | None = None
    #: how many of them each entry has; [] where nothing was scored
    scored_counts: list[int] = dataclasses.field(default_factory=list)
    #: of a pooling engine, one per entry: f32 [size], or [tokens, size] for a token task; None where nothing ended.
    #: `token_ids` is [] then, and every count 0.
    pooled: list[np.ndarray | None] | None = None
    #: i32 [layers with experts, experts]: the tokens that each expert got; None: nobody counts them
    expert_load: np.ndarray | None = None
    #: entry -> why it failed alone: the tokens that it has here are not to be taken
    errors: Mapping[int, str] = dataclasses.field(default_factory=dict)
    #: of a launch with drafts, i32 [entries, steps] each: how many drafts there were, and how many of them were right
    drafted: np.ndarray | None = None
    accepted: np.ndarray | None = None


class StepFuture(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step and read what it sampled."""
        ...


class StageTimer(Protocol):
    def stop(self) -> list[list[tuple[int, float, float]]]:
        """Of each stage (step, when it was launched, when it was done), in order, in seconds of `time.monotonic`."""
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

    def time_stages(self) -> StageTimer | None:
        """Note from here on when each stage of a pipeline is done with each step; None: there are no stages."""
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
