"""Some defaults depend on the machine and on the model; they are found here, with the checks that need them."""

from __future__ import annotations

import logging
import re

from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.scheduler import SchedulerConfig

logger = logging.getLogger(__name__)

_GIB = 2**30

#: XLA:CPU's matmuls are at their best rate from about 512 rows on (measured): longer steps add latency, not throughput
CPU_LIMITS = (512, 256)
#: device memory from this many bytes on -> (max_num_batched_tokens, max_num_seqs); vLLM's offline defaults
GPU_LIMITS = ((70 * _GIB, (16384, 1024)), (0, (8192, 256)))
#: words of the name of a GPU that has the memory of a large one and not its compute; large steps cost an A100
#: throughput, as vLLM has measured
SLOWER_GPUS = frozenset(("a100", "a100x", "gb10"))

#: steps of one launch, and sequences up to which there are programs for several: those of larger steps would save less
#: of a longer time
DEFAULT_DECODE_STEPS = 1
CPU_DECODE_STEPS_SEQS, GPU_DECODE_STEPS_SEQS = 32, 64

#: most requests that run when drafts are made: with more of them a step has enough to do without
CPU_DRAFT_SEQS, GPU_DRAFT_SEQS = 4, 64

#: on a CPU the attention of decode steps takes half the time with 64 (measured); vLLM's default is 16
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 64, 16

#: prompt tokens of a step that get log-probabilities, at most: each costs every step a row of the hidden size
CPU_SCORED_TOKENS, GPU_SCORED_TOKENS = 256, 1024
#: id and value of each of their alternatives leave the device together
SCORED_BYTES = 64 * 2**20


def scheduler_config(
    args: EngineArgs,
    *,
    max_model_len: int,
    platform: str,
    num_logprobs: int = 20,
    device_memory_bytes: int | None = None,
    device_kind: str = "",
) -> SchedulerConfig:
    """Return the scheduler's limits.

    Args:
        args: None in `max_num_seqs` and `max_num_batched_tokens` stands for the platform's default.
        max_model_len: decided already, in tokens.
        platform: JAX's name for it, "cpu", "gpu" or "cuda".
        num_logprobs: most alternatives of a token that a request may ask for.
        device_memory_bytes: of one device; None: unknown, which gets the small GPUs' defaults.
        device_kind: the driver's name for it, such as "NVIDIA A100-SXM4-80GB".

    Raises:
        ValidationError: limits that contradict each other; the text says which values would work.
    """
    if args.long_prefill_token_threshold > max_model_len:
        raise ValidationError(
            f"long_prefill_token_threshold ({args.long_prefill_token_threshold}) cannot be greater than the "
            f"max_model_len ({max_model_len})."
        )
    default_tokens, default_seqs = platform_limits(platform, device_memory_bytes, device_kind)
    num_seqs, num_tokens = args.max_num_seqs, args.max_num_batched_tokens
    if num_seqs is None:
        num_seqs = default_seqs
        if num_tokens is not None and num_tokens < num_seqs:
            logger.warning(
                "max_num_batched_tokens (%d) is less than the default max_num_seqs (%d), and a step gives every "
                "running request at least one token; using max_num_seqs=%d.",
                num_tokens,
                num_seqs,
                num_tokens,
            )
            num_seqs = num_tokens
    if args.max_num_active_seqs is not None and args.max_num_active_seqs > num_seqs:
        raise ValidationError(
            f"max_num_active_seqs ({args.max_num_active_seqs}) cannot be greater than max_num_seqs ({num_seqs}), for "
            f"which there is room. Set max_num_active_seqs to at most {num_seqs}, or a larger max_num_seqs."
        )
    if args.long_prefill_token_threshold_adaptive and not args.long_prefill_token_threshold:
        logger.warning("long_prefill_token_threshold_adaptive has no effect without a long_prefill_token_threshold.")
    most_useful = num_seqs * max_model_len
    if num_tokens is None:
        num_tokens = default_tokens
        if num_tokens < num_seqs:
            logger.warning(
                "max_num_seqs (%d) is more than the default max_num_batched_tokens (%d), and a step gives every "
                "running request at least one token; using max_num_batched_tokens=%d.",
                num_seqs,
                num_tokens,
                num_seqs,
            )
            num_tokens = num_seqs
        if not args.enable_chunked_prefill:
            num_tokens = max(num_tokens, max_model_len)
        num_tokens = min(num_tokens, most_useful)
    elif num_tokens > most_useful:
        logger.warning(
            "max_num_batched_tokens (%d) exceeds max_num_seqs * max_model_len (%d), more than a step can ever hold; "
            "using %d.",
            num_tokens,
            most_useful,
            most_useful,
        )
        num_tokens = most_useful
    if not args.enable_chunked_prefill and num_tokens < max_model_len:
        raise ValidationError(
            f"max_num_batched_tokens ({num_tokens}) is smaller than max_model_len ({max_model_len}), and without "
            f"chunked prefill a prompt has to fit into one step. Set max_num_batched_tokens to at least "
            f"{max_model_len}, max_model_len to at most {num_tokens}, or enable_chunked_prefill=True."
        )
    num_steps = args.num_decode_steps or DEFAULT_DECODE_STEPS
    if num_steps > 1 and args.enforce_eager:
        logger.warning("num_decode_steps=%d has no effect with enforce_eager=True, which compiles least.", num_steps)
        num_steps = 1
    drafts = _drafts(args, num_tokens)
    draft_seqs = _draft_seqs(args, platform)
    draft_seqs = min(draft_seqs, num_seqs, num_tokens // (1 + drafts)) if drafts else 0
    steps_seqs = CPU_DECODE_STEPS_SEQS if platform == "cpu" else GPU_DECODE_STEPS_SEQS
    scored_tokens = CPU_SCORED_TOKENS if platform == "cpu" else GPU_SCORED_TOKENS
    return SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        max_model_len=max_model_len,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=args.long_prefill_token_threshold_adaptive,
        max_num_active_seqs=args.max_num_active_seqs,
        policy=args.scheduling_policy,
        max_scored_tokens=max(1, min(scored_tokens, SCORED_BYTES // (8 * max(num_logprobs, 1)))),
        enable_chunked_prefill=args.enable_chunked_prefill,
        async_scheduling=args.async_scheduling,
        reserve_full_prompt=args.scheduler_reserve_full_isl,
        stream_interval=args.stream_interval,
        num_decode_steps=num_steps,
        max_decode_steps_seqs=min(steps_seqs, num_seqs) if num_steps > 1 and not drafts else 0,
        num_drafts=drafts,
        max_draft_seqs=draft_seqs,
        keeps_outputs=bool(drafts and _keeps_outputs(args)),
        drafts_by_num_seqs=_drafts_by_num_seqs(args, draft_seqs),
        max_loras=args.max_loras if args.enable_lora else 0,
        num_draft_steps=max(min(num_steps, num_tokens // (2 * (1 + drafts))), 1),
    )


def _drafts(args: EngineArgs, num_tokens: int) -> int:
    """Most drafts of a step."""
    if args.speculative_config is None:
        return 0
    drafts = args.speculative_config.num_speculative_tokens
    assert drafts is not None
    # two launches are under way, and a window's bound on blocks holds for no more tokens than a step has
    if 2 * (1 + drafts) > num_tokens:
        raise ValidationError(
            f"num_speculative_tokens={drafts} needs max_num_batched_tokens of at least {2 * (1 + drafts)}, since two "
            f"steps with drafts are under way at once, and it is {num_tokens}. Set a larger max_num_batched_tokens, or "
            f"num_speculative_tokens to at most {max(num_tokens // 2 - 1, 0)}."
        )
    return drafts


def _keeps_outputs(args: EngineArgs) -> bool:
    config = args.speculative_config
    return config is not None and config.method == "suffix" and bool(config.suffix_decoding_max_cached_requests)


def _draft_seqs(args: EngineArgs, platform: str) -> int:
    """Most requests that run when drafts are made."""
    most = CPU_DRAFT_SEQS if platform == "cpu" else GPU_DRAFT_SEQS
    ranges = args.speculative_config and args.speculative_config.num_speculative_tokens_per_batch_size
    return max(most, *(last for _, last, drafts in ranges if drafts)) if ranges else most


def _drafts_by_num_seqs(args: EngineArgs, draft_seqs: int) -> tuple[int, ...]:
    """`SchedulerConfig.drafts_by_num_seqs`."""
    config = args.speculative_config
    if config is None or config.num_speculative_tokens_per_batch_size is None:
        return ()
    return tuple(config.drafts_of(num_seqs) for num_seqs in range(1, draft_seqs + 1))


def default_block_size(platform: str) -> int:
    """Return the tokens of a block of the KV cache, unless `EngineArgs.block_size` says it."""
    return CPU_BLOCK_SIZE if platform == "cpu" else GPU_BLOCK_SIZE


def platform_limits(platform: str, device_memory_bytes: int | None = None, device_kind: str = "") -> tuple[int, int]:
    """Return the default (`max_num_batched_tokens`, `max_num_seqs`)."""
    if platform == "cpu":
        return CPU_LIMITS
    if not SLOWER_GPUS.isdisjoint(re.split(r"[^a-z0-9]+", device_kind.lower())):
        return GPU_LIMITS[-1][1]
    return next(limits for least, limits in GPU_LIMITS if (device_memory_bytes or 0) >= least)
