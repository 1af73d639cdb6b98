"""The scheduler has limits of a step and of a request."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step (`max_num_batched_tokens`, `max_num_seqs`) and of one request (`max_model_len`)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    #: at most this many prompt tokens of one request a step while others run or wait; 0: no limit
    long_prefill_token_threshold: int = 0
    #: let that limit be no less than each running or waiting request's share of `max_num_batched_tokens`
    long_prefill_token_threshold_adaptive: bool = False
    #: most requests that run at once; None: `max_num_seqs`, which the runner has room for
    max_num_active_seqs: int | None = None
    #: "fcfs" or "priority" (smaller value first, then arrival)
    policy: str = "fcfs"
    #: at most this many prompt tokens of a step get log-probabilities; a prompt that wants them is computed in chunks
    #: of no more, whatever `enable_chunked_prefill` says
    max_scored_tokens: int = 256
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    #: other processes schedule the same requests, and have to decide the same: nothing may depend on time
    lockstep: bool = False
    #: admit a prompt only when all of it fits into the free blocks
    reserve_full_prompt: bool = True
    #: tokens between two outputs of a streamed request
    stream_interval: int = 1
    #: most decode steps of one launch; 1: there are no programs for more
    num_decode_steps: int = 1
    #: most requests that such a launch has room for
    max_decode_steps_seqs: int = 0
    #: most drafts of a decode step, and most requests that run when there are any; 0: nobody makes drafts
    num_drafts: int = 0
    max_draft_seqs: int = 0
    #: the most for each number of running requests, from one on; (): `num_drafts` for all
    drafts_by_num_seqs: tuple[int, ...] = ()
    #: whether drafts are made of what earlier requests got, too
    keeps_outputs: bool = False
    #: most steps of a launch with drafts
    num_draft_steps: int = 1
    #: steps that are under way at different stages of a pipeline, of different requests
    num_micro_batches: int = 1
    #: vectors of pictures that there is room for on the device, and those that a step makes; 0: there are no pictures
    encoder_cache_tokens: int = 0
    max_encoder_tokens: int = 0
    #: whether a chunk has all tokens of a picture that it has any of
    keeps_media_whole: bool = False
    #: adapters that the device has at once; 0: there are none
    max_loras: int = 0
