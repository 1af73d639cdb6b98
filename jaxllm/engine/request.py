"""One request, from its arrival to its end, as the host sees it."""

from __future__ import annotations

import enum
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxllm.api.constraints import RepetitionDetectionParams
from jaxllm.api.outputs import RequestMetrics
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.multimodal.items import HeldMedia

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

    import numpy as np

    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.engine.adapters import Adapter
    from jaxllm.engine.cache.block_hash import ExtraKey
    from jaxllm.multimodal.items import PromptMedia
    from jaxllm.structured.compiler import Grammar
    from jaxllm.structured.drafts import HostDrafts
    from jaxllm.structured.matcher import Matcher


#: the stop reason of a repetition, as vLLM calls it
REPETITION_DETECTED = "repetition_detected"


class RequestStatus(enum.IntEnum):
    """Where a request is. Everything above `PREEMPTED` is final."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6
    FINISHED_REPETITION = 7

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "abort", "error" or "repetition"; None while the request is not finished."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
    RequestStatus.FINISHED_REPETITION: "repetition",
}


class Request:
    """A prompt, its outputs so far, and what scheduler and KV-cache manager know about it.

    Args:
        request_id: unique among the unfinished requests.
        prompt_token_ids: at least one token id.
        params: how to sample or pool, checked already. A request that pools ends when its prompt is computed.
        eos_token_ids: the model's own ends of generation.
        seed: the seed of its sampling, decided already.
        priority: smaller runs first under the "priority" policy.
        arrival_time: seconds of `time.monotonic()`; None: now.
        cache_salt: requests with different salts never share cached blocks.
        extra_keys: what else the keys and values depend on (LoRA adapter, images).
        skip_reading_prefix_cache: compute the whole prompt even where the cache has it; None: what `params` say.
        block_hashes: of leading full blocks of the prompt, as far as they are known already.
        prompt_embeds: [tokens, hidden size], the prompt where it came as vectors; `prompt_token_ids` says nothing then.
        media: what the prompt holds besides tokens, whose content `extra_keys` name.
        adapter: what it goes through the model with, whose key is among `extra_keys`; None: the model alone.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "all_token_ids",
        "arrival_order",
        "arrival_time",
        "bad_words",
        "block_hashes",
        "block_tables",
        "cache_salt",
        "decode_steps_from",
        "end_token_ids",
        "eos_token_ids",
        "error",
        "extra_keys",
        "first_live_blocks",
        "first_token_ts",
        "grammar",
        "host_drafts",
        "is_child",
        "last_token_ts",
        "matcher",
        "max_decode_steps",
        "max_total_tokens",
        "media",
        "media_stop",
        "micro_batch",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_drafted_tokens",
        "num_external_tokens",
        "num_output_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_scheduled_scores",
        "num_scored_tokens",
        "num_slots",
        "num_unsure_tokens",
        "params",
        "pools",
        "priority",
        "prompt_embeds",
        "prompt_token_ids",
        "queued_ts",
        "recorded_ts",
        "register_at",
        "repetition",
        "request_id",
        "routine_until",
        "row",
        "scheduled_ts",
        "seed",
        "skip_reading_prefix_cache",
        "status",
        "stop_reason",
        "stop_token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams | PoolingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        seed: int = 0,
        priority: int = 0,
        arrival_time: float | None = None,
        cache_salt: str | None = None,
        extra_keys: tuple[ExtraKey, ...] = (),
        skip_reading_prefix_cache: bool | None = None,
        block_hashes: Sequence[bytes] = (),
        prompt_embeds: np.ndarray | None = None,
        media: PromptMedia | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.prompt_embeds = prompt_embeds
        self.media = None if media is None else HeldMedia(media)
        #: the place behind its last item; 0: there is none
        self.media_stop = 0 if media is None else media.stop
        self.adapter = adapter
        #: where the device has it, -1 when not running
        self.adapter_slot = -1
        self.num_prompt_tokens = len(prompt_token_ids)
        #: prompt, then the outputs that the host has read
        self.all_token_ids = list(prompt_token_ids)
        self.params: Any = params
        self.pools = isinstance(params, PoolingParams)
        #: leading tokens whose successors' log-probabilities are wanted: all of the prompt but its last token
        self.num_scored_tokens = 0
        if not isinstance(params, PoolingParams) and params.prompt_logprobs is not None:
            self.num_scored_tokens = self.num_prompt_tokens - 1
        #: token sequences that must not be generated, made from `params.bad_words` by the input processor
        self.bad_words: tuple[tuple[int, ...], ...] = ()
        self.eos_token_ids = frozenset(eos_token_ids)
        #: every id that the device masks until `min_tokens`: as in vLLM, EOS is among them even under `ignore_eos`
        self.stop_token_ids = self.eos_token_ids.union(getattr(params, "stop_token_ids", None) or ())
        #: the ids that end it
        self.end_token_ids = frozenset(getattr(params, "stop_token_ids", None) or ())
        if not getattr(params, "ignore_eos", True):
            self.end_token_ids |= self.eos_token_ids
        #: ends that only the pattern of the last tokens can tell; None: not asked for
        self.repetition: RepetitionDetectionParams | None = None
        detection = getattr(params, "repetition_detection", None)
        if isinstance(detection, RepetitionDetectionParams) and detection.max_pattern_size:
            self.repetition = detection
        self.seed = seed
        self.priority = priority
        self.arrival_time = time.monotonic() if arrival_time is None else arrival_time
        self.cache_salt = cache_salt
        self.extra_keys = extra_keys
        if skip_reading_prefix_cache is None:
            # what the cache has is not computed, so that nothing could be said of it
            skip_reading_prefix_cache = bool(params.skip_reading_prefix_cache) or self.num_scored_tokens > 0
        self.skip_reading_prefix_cache = skip_reading_prefix_cache
        #: one of several completions of a prompt
        self.is_child = False

        self.status = RequestStatus.WAITING
        #: the stop string or token id that ended it; None for EOS and every other end
        self.stop_reason: int | str | None = None
        #: why it ended with "error"
        self.error: str | None = None
        #: the grammar that is being compiled; the request waits for it
        self.grammar: Future[Grammar] | None = None
        #: what its outputs have to be, as far as they have come; None: anything
        self.matcher: Matcher | None = None
        #: who drafts for it while its matcher restricts it; None: nobody
        self.host_drafts: HostDrafts | None = None
        #: device row, -1 when not running
        self.row = -1
        #: tokens with keys and values in the cache once every step scheduled so far has run
        self.num_computed_tokens = 0
        #: tokens that scheduled steps sample and that the host has not read
        self.num_output_placeholders = 0
        #: tokens that launches with drafts may have brought, and perhaps have not: the host has not read them. The
        #: two numbers above count all of them
        self.num_unsure_tokens = 0
        #: of the leading `num_scored_tokens`, those that scheduled steps have scored; a preemption takes none back
        self.num_scheduled_scores = 0
        #: prefix hits at the first admission, in tokens; -1 before it
        self.num_cached_tokens = -1
        #: those of them that came from the host's pool of blocks
        self.num_external_tokens = 0
        self.num_preemptions = 0
        #: drafts for its positions, and those of them that were right
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        #: of a pipeline, the last step that it was in (`engine.scheduling.micro_batches`)
        self.micro_batch = -1

        # The scheduler's.
        #: generation ends when prompt and outputs are this many tokens
        self.max_total_tokens = sys.maxsize
        #: while it has fewer tokens, the next one ends it only if it is one of `end_token_ids`
        self.routine_until = sys.maxsize
        #: breaks ties between equal arrival times
        self.arrival_order = 0
        #: most decode steps of one launch, once `num_computed_tokens` has come as far as this (`DecodeSteps`)
        self.max_decode_steps = 1
        self.decode_steps_from = sys.maxsize

        # The KV-cache manager's.
        #: hashes of the leading full blocks, as far as somebody asked
        self.block_hashes = list(block_hashes)
        #: per group the block ids, in order of position, 0 where the window has passed; () when not running
        self.block_tables: tuple[list[int], ...] = ()
        #: per group the index of the first block in the table that the window has not passed
        self.first_live_blocks: list[int] = []
        #: tokens that the block tables have room for
        self.num_slots = 0
        #: leading blocks that the prefix cache knows
        self.num_registered_blocks = 0
        #: number of tokens at which the next block is full and goes into the prefix cache
        self.register_at = sys.maxsize

        # seconds of time.monotonic(); 0.0 where it has not happened
        self.queued_ts = 0.0
        self.scheduled_ts = 0.0
        self.first_token_ts = 0.0
        self.last_token_ts = 0.0
        #: `last_token_ts` as the metrics know it
        self.recorded_ts = 0.0

    def fork(self, request_id: str, params: SamplingParams, seed: int) -> Request:
        """The same prompt as another request, a child, that has not begun."""
        fork = Request(
            request_id,
            self.prompt_token_ids,
            params,
            eos_token_ids=self.eos_token_ids,
            seed=seed,
            priority=self.priority,
            arrival_time=self.arrival_time,
            cache_salt=self.cache_salt,
            extra_keys=self.extra_keys,
            # only the child that has the prompt's log-probabilities computes a cached prompt for them
            skip_reading_prefix_cache=None if self.num_scored_tokens else self.skip_reading_prefix_cache,
            block_hashes=self.block_hashes,
            prompt_embeds=self.prompt_embeds,
            media=None if self.media is None else self.media.media,
            adapter=self.adapter,
        )
        fork.bad_words = self.bad_words
        fork.is_child = True
        return fork

    @property
    def lora_request(self) -> LoRARequest | None:
        """What names its adapter."""
        return None if self.adapter is None else self.adapter.request

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows: prompt and outputs read."""
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the outputs read so far."""
        return self.all_token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> str | None:
        return self.status.finish_reason

    def check_stop(self) -> tuple[RequestStatus | None, int | str | None]:
        """Status and stop reason that the newest token ends the request with; (None, None) if it goes on.

        vLLM's order: EOS unless `ignore_eos` (no stop reason), `stop_token_ids` (the id), length, and behind
        `min_tokens` repetition. For the stops `min_tokens` is enforced on the device, which does not sample one before
        it. Stop strings are the output processor's, which sees the text.
        """
        token_id = self.all_token_ids[-1]
        if token_id in self.stop_token_ids:
            if token_id in self.eos_token_ids and not self.params.ignore_eos:
                return RequestStatus.FINISHED_STOPPED, None
            if token_id in (self.params.stop_token_ids or ()):
                return RequestStatus.FINISHED_STOPPED, token_id
        if len(self.all_token_ids) >= self.max_total_tokens:
            return RequestStatus.FINISHED_LENGTH, None
        if self.repetition is not None and self.num_output_tokens >= self.params.min_tokens:
            if ends_in_repetition(self.all_token_ids, self.num_prompt_tokens, self.repetition):
                return RequestStatus.FINISHED_REPETITION, REPETITION_DETECTED
        return None, None

    def metrics(self, arrived: float) -> RequestMetrics:
        """When things happened to it; `arrived` is the wall-clock time of its arrival (`time.time()`)."""
        first = self.first_token_ts
        return RequestMetrics(
            num_generation_tokens=self.num_output_tokens,
            arrival_time=arrived,
            queued_ts=self.queued_ts,
            scheduled_ts=self.scheduled_ts,
            first_token_ts=first,
            last_token_ts=self.last_token_ts,
            first_token_latency=first - self.arrival_time if first else 0.0,
            num_preemptions=self.num_preemptions,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, prompt={self.num_prompt_tokens}, "
            f"outputs={self.num_output_tokens}+{self.num_output_placeholders}, computed={self.num_computed_tokens})"
        )


def ends_in_repetition(token_ids: list[int], start: int, params: RepetitionDetectionParams) -> bool:
    """Whether ``token_ids[start:]`` ends with some pattern of an allowed size, `min_count` times in a row."""
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        length = size * params.min_count
        first = len(token_ids) - length
        if first < start:
            return False
        # a tail that repeats with this period equals itself shifted by it; the first comparison mostly says no
        if token_ids[-1] == token_ids[-1 - size] and token_ids[first:-size] == token_ids[first + size :]:
            return True
    return False
