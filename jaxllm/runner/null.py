"""The null model: everything of the engine but the model, for measuring the host (``load_format="null"``).

Tokenizer, scheduler, block manager, packing, detokenizer and outputs are the real ones and do their full work. A step
is packed into the buffer that the device would get, and computes nothing: it answers at once, in an array like the
device's, with one ordinary token of the vocabulary after the other. What is generated is meaningless, and so is
everything that a model would have decided: log-probabilities are 0, sampling parameters that change the distribution
change nothing. Tokens never end a request by themselves; its length, its stop strings and its stop token ids do.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import MAX_LOGPROB_TOKEN_IDS
from jaxllm.engine.step import LogprobArrays, SchedulerOutput, StepOutput
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.build import make_programs
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_rows import PackedStep, SamplingRows
from jaxllm.runner.memory.fit import blocks_of_one, memory_plan
from jaxllm.runner.memory.plan import CPU_CACHE_LIMIT, MemoryPlan
from jaxllm.runner.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from jaxllm.runner.runner_config import RunnerConfig

logger = logging.getLogger("jaxllm")

#: tokens that the answers cycle through
_CYCLE = 64
_NO_WEIGHTS = 'load_format="null" has no weights to read, save or replace.'


class NullStep:
    """A launch that was over when it was made (`engine.step.StepFuture`).

    Args:
        sampled: int [n, steps], of each sampled row its tokens; -1 where there is none.
        num_logprobs: alternatives to each token.
    """

    def __init__(self, packed: PackedStep, sampled: np.ndarray, num_logprobs: int):
        self._packed, self._sampled, self._num_logprobs = packed, sampled, num_logprobs

    def result(self) -> StepOutput:
        packed = self._packed
        tokens = np.full((packed.num_entries, self._sampled.shape[1]), -1, np.int32)
        tokens[packed.sampled_entries] = self._sampled
        there = tokens >= 0
        token_ids = tokens[there].tolist()
        scored = sum(packed.scored_counts)
        return StepOutput(
            token_ids=token_ids,
            counts=there.sum(axis=1).tolist(),
            logprobs=self._logprobs(len(token_ids)) if packed.want_logprobs else None,
            scored_counts=packed.scored_counts,
            prompt_logprobs=self._logprobs(scored) if scored else None,
        )

    def _logprobs(self, count: int) -> LogprobArrays:
        shape = count, self._num_logprobs
        return LogprobArrays(
            sampled=np.zeros(count, np.float32),
            rank=np.ones(count, np.int32),
            top_ids=np.broadcast_to(np.arange(self._num_logprobs, dtype=np.int32), shape),
            top=np.zeros(shape, np.float32),
            chosen=np.broadcast_to(np.float32(0), (count, MAX_LOGPROB_TOKEN_IDS)),
        )


class NullDrafts(NamedTuple):
    """A launch with drafts (`engine.step.StepFuture`)."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class NullRunner:
    """No device and no weights (`engine.step.ModelRunner`).

    Args:
        token_ids: what is "sampled": the token at position p of any request is ``token_ids[p % len(token_ids)]``.
        programs: whose shapes steps are packed into; none of them is compiled.
        table_width: blocks of the longest request.
    """

    def __init__(self, token_ids: Sequence[int], programs: SamplingPrograms, table_width: int):
        self._cycle = np.asarray(token_ids, np.int32)
        self._programs = programs
        self._num_logprobs = programs.config.num_logprobs
        self._rows = Rows(programs.max_num_seqs, len(programs.config.groups), table_width)
        self._sampling = SamplingRows(programs)
        self._reached = np.zeros(programs.max_num_seqs, np.int64)

    @property
    def num_bytes(self) -> int:
        """It holds nothing."""
        return 0

    def time_stages(self) -> None:
        """It has no stages."""

    def execute(self, scheduled: SchedulerOutput) -> NullStep | NullDrafts:
        if not scheduled.goes_on_alone:
            return self.sample(self.forward(scheduled), {})
        self._admit(scheduled)
        if scheduled.num_drafts:
            return self._draft_steps(scheduled)
        packings = self._programs.decode_packings
        packing = packings[pick_bucket(tuple(packings), scheduled.step_sizes()[0], len(scheduled.rows))]
        packed = self._sampling.pack_decode_steps(scheduled, self._rows, packing)
        steps = np.arange(scheduled.num_steps)
        # the steps go on behind an end: the host drops what comes there
        sampled = self._sampled(packed, packing.size, steps)
        sampled[steps >= np.asarray(scheduled.counts)[packed.sampled_entries, None]] = -1
        return NullStep(packed, sampled, self._num_logprobs)

    def _draft_steps(self, scheduled: SchedulerOutput) -> NullDrafts:
        """Of the drafts for a position p, ``p % (1 + num_drafts)`` are right."""
        drafts, steps = scheduled.num_drafts, scheduled.num_steps
        packings = self._programs.draft_packings
        packing = packings[pick_bucket(tuple(packings), len(scheduled.rows), len(scheduled.rows))]
        self._sampling.pack_decode_steps(scheduled, self._rows, packing)
        output = StepOutput(token_ids=[], counts=[])
        output.drafted = np.zeros((len(scheduled.rows), steps), np.int32)
        output.accepted = np.zeros_like(output.drafted)
        entries = zip(scheduled.rows, scheduled.starts, scheduled.counts, scheduled.resumes, strict=True)
        for entry, (row, start, limit, resumes) in enumerate(entries):
            reached = self._reached[row] if resumes else start
            count = 0
            for step in range(steps):
                drafted = min(drafts, limit - count - 1)
                if drafted < 0:
                    break
                accepted = min(int(reached) % (1 + drafts), drafted)
                output.drafted[entry, step], output.accepted[entry, step] = drafted, accepted
                output.token_ids += self._cycle[(reached + 1 + np.arange(accepted + 1)) % len(self._cycle)].tolist()
                reached, count = reached + accepted + 1, count + accepted + 1
            self._reached[row] = reached
            output.counts.append(count)
        return NullDrafts(output)

    def _admit(self, scheduled: SchedulerOutput) -> None:
        self._rows.update(scheduled)
        for request in scheduled.admitted:
            self._sampling.admit(request)

    def forward(self, scheduled: SchedulerOutput) -> tuple[PackedStep, int]:
        self._admit(scheduled)
        packing = self._programs.packings[self.bucket(scheduled.num_tokens, len(scheduled.rows))]
        return self._sampling.pack(scheduled, self._rows, packing), packing.size

    def sample(self, launched: tuple[PackedStep, int], masks: Mapping[int, np.ndarray]) -> NullStep:
        """A row with a mask gets its first allowed token."""
        packed, size = launched
        sampled = self._sampled(packed, size, np.zeros(1, np.int32))
        for row, mask in masks.items():
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            sampled[packed.masked[row]] = allowed[0] if len(allowed) else -1
        return NullStep(packed, sampled, self._num_logprobs)

    def _sampled(self, packed: PackedStep, size: int, steps: np.ndarray) -> np.ndarray:
        """int [n, steps]: the tokens of the sampled rows, whose positions lie behind `size` words of the buffer."""
        positions = self._programs.sample_packing.views(packed.buffer[size:])["positions"]
        positions = positions[: len(packed.sampled_entries), None] + steps
        return self._cycle[positions % len(self._cycle)]

    def reset(self) -> None:
        """Nothing outlives a step but what the rows are admitted with."""

    @property
    def params(self) -> NoReturn:
        """`Runner` has its weights under this name, and the next one. Raises ValidationError."""
        raise ValidationError(_NO_WEIGHTS)

    model_params = params

    def set_params(self, params: object) -> NoReturn:
        """Raises ValidationError."""
        raise ValidationError(_NO_WEIGHTS)

    def bucket(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The one that a step of this size would run in."""
        return self._programs.bucket(num_tokens, num_seqs)

    def free_cache(self) -> None:
        """There is none."""

    def free_weights(self, *, keep_on_host: bool) -> None:
        """There are none."""

    def restore_weights(self) -> None:
        """There are none."""

    def shutdown(self) -> None:
        """There is nothing to free."""


def ordinary_tokens(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, end_token_ids: Collection[int]
) -> list[int]:
    """The first ids that neither end a request nor were added to the tokenizer's own vocabulary, and that decode to
    printable ASCII text.

    `all_special_ids` are only those with a part of their own (end, padding, ...); what else is special is an added
    token, and it would decode to nothing. Raises ValidationError when the vocabulary has none.
    """
    special = set(end_token_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    found: list[int] = []
    for token_id in range(vocab_size):
        if token_id in special:
            continue
        if tokenizer is not None:
            text = str(tokenizer.decode([token_id]))
            if not text.strip() or not (text.isascii() and text.isprintable()):
                continue
        found.append(token_id)
        if len(found) == _CYCLE:
            break
    if not found:
        raise ValidationError('load_format="null" needs an ordinary token, and the vocabulary has none.')
    return found


def null_runner(config: RunnerConfig, token_ids: Sequence[int]) -> tuple[NullRunner, MemoryPlan]:
    """A runner without a model, and the plan of the memory that the host believes it has.

    The cache has as many blocks as `num_gpu_blocks_override` or `kv_cache_memory_bytes` say, by default those of 2 GiB,
    and no memory is taken for them.

    Raises:
        ValidationError: the blocks do not hold one request of max_model_len tokens.
    """
    limits = config.scheduler
    needed = blocks_of_one(config)
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = (config.kv_cache_memory_bytes or CPU_CACHE_LIMIT) // config.block_bytes
        if config.kv_cache_memory_bytes is None:
            num_blocks = max(min(num_blocks, 1 + limits.max_num_seqs * needed), 1 + needed)
    if num_blocks - 1 < needed:
        raise ValidationError(
            f"A request of max_model_len={limits.max_model_len} tokens needs {needed + 1} blocks of KV cache, and "
            f"there are {num_blocks}. Set num_gpu_blocks_override to {needed + 1}, or a smaller max_model_len."
        )
    logger.warning(
        'load_format="null": there is no model and no device work, so outputs are meaningless; this measures the host.'
    )
    nothing = dict.fromkeys(
        ("total_bytes", "weight_bytes", "state_bytes", "kv_cache_bytes", "host_cache_bytes", "unused_bytes"), 0
    )
    plan = dataclasses.replace(
        memory_plan(config, num_blocks, 0), device="no device (null model)", kv_cache_limit=None, **nothing
    )
    programs = make_programs(config, config.params(), num_blocks)
    assert isinstance(programs, SamplingPrograms)
    return NullRunner(token_ids, programs, config.table_width), plan
