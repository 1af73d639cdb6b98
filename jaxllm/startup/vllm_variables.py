"""vLLM's environment variables: none is read, and those that a script sets for their effect are named."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("jaxllm")

#: those that change what vLLM does -> what does so here
INSTEAD = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "hf_overrides={'max_position_embeddings': ...}",
    "VLLM_API_KEY": "JAXLLM_API_KEY",
    "VLLM_ATTENTION_BACKEND": "attention_backend=...",
    "VLLM_BATCH_INVARIANT": "deterministic=True",
    "VLLM_CPU_KVCACHE_SPACE": "kv_cache_memory_bytes=...",
    "VLLM_LOGGING_LEVEL": "JAXLLM_LOGGING_LEVEL",
    "VLLM_LOG_STATS_INTERVAL": "JAXLLM_LOG_STATS_INTERVAL",
    "VLLM_PP_LAYER_PARTITION": "pipeline_layer_partition=...",
    "VLLM_SERVER_DEV_MODE": "jaxllm serve --enable-admin-endpoints",
    "VLLM_TORCH_PROFILER_DIR": "profiler_config={'torch_profiler_dir': ...}",
}


def tell_of_variables() -> None:
    """Log, in one line, which of them are set, and what to write in their place."""
    found = [f"{name} ({instead})" for name, instead in INSTEAD.items() if os.environ.get(name) not in (None, "", "0")]
    if found:
        logger.warning(
            "vLLM's environment variables have no effect in jaxllm; in their place stand: %s.", ", ".join(found)
        )
