"""What is said when running requests outgrow the KV cache: what was lost, and the values that avoid it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.cache.manager import KVCacheManager
    from jaxllm.engine.request import Request

logger = logging.getLogger("jaxllm")

#: the first preemption is logged, then every so many
LOG_INTERVAL = 50


@dataclasses.dataclass(frozen=True, slots=True)
class Shortage:
    """The state at the first preemption of a step, before anybody gave anything back."""

    running: list[Request]
    #: blocks with which this step would have preempted nobody
    blocks_needed: int

    @classmethod
    def measure(cls, kv_cache_manager: KVCacheManager, running: list[Request], first: Request) -> Shortage:
        """Add to the blocks in use what `first` and those behind it lack for their tokens, none of them scheduled."""
        left = running[running.index(first) :]
        lacking = sum(kv_cache_manager.missing_blocks(request) for request in left)
        return cls(list(running), kv_cache_manager.pool.num_used + lacking)


class PreemptionLog:
    """Counts preemptions and warns about them, rarely enough to be read.

    Args:
        warns: whether it does.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, *, warns: bool = True) -> None:
        self._kv, self._warns = kv_cache_manager, warns
        #: preemptions so far
        self.count = 0
        #: computed tokens given up so far; what the prefix cache keeps of them is not subtracted
        self.tokens_lost = 0

    def count_one(self, victim: Request) -> None:
        """Count a preemption that has just happened; `victim.num_computed_tokens` still says what is lost."""
        self.count += 1
        self.tokens_lost += victim.num_computed_tokens

    def warn(self, victim: Request, num_lost: int, shortage: Shortage, usage_before: float) -> None:
        """Say that blocks lacked, if it is the first of all preemptions or another `LOG_INTERVAL` are full.

        Args:
            victim: has given its blocks back, and its `num_lost` computed tokens.
            shortage: measured at the step's first preemption.
            usage_before: of the KV cache, in [0, 1], when the victim still had its blocks.
        """
        if not self._warns or (self.count > 1 and self.count % LOG_INTERVAL):
            return
        usable = self._kv.pool.num_usable
        at_most = sorted(
            (self._kv.blocks_needed(request.max_total_tokens - 1) for request in shortage.running), reverse=True
        )
        fitting, total = 0, 0
        for blocks in sorted(at_most, reverse=True):
            total += blocks
            if total > usable:
                break
            fitting += 1
        logger.warning(
            "Sequence group %s is preempted by PreemptionMode.RECOMPUTE mode because there is not enough KV cache "
            "space. This can affect the end-to-end performance. Increase gpu_memory_utilization or "
            "tensor_parallel_size to provide more KV cache memory. total_cumulative_preemption_cnt=%d. "
            "Lost: %d computed tokens of this request (preempted %d times so far), %d of all requests so far; "
            "KV cache usage %.1f%% -> %.1f%%. The %d requests that were running need %d blocks now and at most %d "
            "until they end; the cache has %d. num_gpu_blocks_override >= %d would have avoided this preemption, "
            "num_gpu_blocks_override >= %d or max_num_seqs <= %d every one of these requests.",
            victim.request_id,
            self.count,
            num_lost,
            victim.num_preemptions,
            self.tokens_lost,
            100 * usage_before,
            100 * self._kv.usage,
            len(shortage.running),
            shortage.blocks_needed,
            sum(at_most),
            usable,
            # Block 0 belongs to the pool's size, but holds no tokens.
            shortage.blocks_needed + 1,
            sum(at_most) + 1,
            max(1, fitting),
        )
