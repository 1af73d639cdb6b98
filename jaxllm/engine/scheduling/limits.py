"""How long a request may be: what `max_model_len` and the size of the pool leave room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.cache.manager import KVCacheManager
    from jaxllm.engine.request import Request


class LengthLimits:
    """Limits in tokens.

    Raises:
        ValueError: the pool cannot hold a token, or chunks are needed and forbidden.
    """

    def __init__(self, config: SchedulerConfig, kv_cache_manager: KVCacheManager) -> None:
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < config.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) is smaller than max_model_len "
                f"({config.max_model_len}), so that without chunked prefill longer prompts can never run. Increase "
                "max_num_batched_tokens, decrease max_model_len or set enable_chunked_prefill=True."
            )
        self._kv = kv_cache_manager
        self._max_model_len = config.max_model_len
        #: most tokens of one request that the whole pool can hold
        self.max_tokens_per_request = kv_cache_manager.max_tokens_per_request
        if not self.max_tokens_per_request:
            cache = kv_cache_manager.config
            raise ValueError(
                f"{cache.num_blocks} blocks of {cache.block_size} tokens, of which block 0 is not usable, cannot hold "
                f"one token of {len(cache.groups)} KV-cache groups with max_num_batched_tokens="
                f"{config.max_num_batched_tokens}. Set num_gpu_blocks_override >= "
                f"{kv_cache_manager.blocks_needed(1) + 1}, or increase gpu_memory_utilization."
            )
        #: prompt and outputs together; the last token's keys and values are never needed
        self.max_total_tokens = min(config.max_model_len, self.max_tokens_per_request + 1)

    def check_prompt(self, length: int, *, pools: bool = False) -> None:
        """Raise `ValidationError` for a prompt that can never run.

        Args:
            pools: nothing is generated after it.
        """
        if not length:
            raise ValidationError("The decoder prompt cannot be empty")
        if pools and length > self._max_model_len:
            raise ValidationError(
                f"The prompt (length {length}) is longer than the maximum model length of {self._max_model_len}. "
                "Shorten it, or let it be cut with tokenization_kwargs={'truncate_prompt_tokens': -1}."
            )
        if not pools and length >= self._max_model_len:
            raise ValidationError(
                f"The decoder prompt (length {length}) is longer than the maximum model length of "
                f"{self._max_model_len}, of which one token must be left to generate. Shorten the prompt, or set "
                f"max_model_len >= {length + 1}."
            )
        if length > self.max_tokens_per_request:
            raise ValidationError(
                f"The decoder prompt (length {length}) does not fit into the KV cache, which holds at most "
                f"{self.max_tokens_per_request} tokens of one request. Shorten the prompt, increase "
                f"gpu_memory_utilization, or set num_gpu_blocks_override >= {self._kv.blocks_needed(length) + 1}."
            )

    def end_of(self, request: Request) -> int:
        """Prompt and output tokens at which the request ends."""
        if request.pools:
            return request.num_prompt_tokens + 1
        if request.params.max_tokens is None:
            return self.max_total_tokens
        return min(self.max_total_tokens, request.num_prompt_tokens + request.params.max_tokens)
