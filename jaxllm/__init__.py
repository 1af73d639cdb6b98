"""jaxllm: an LLM inference engine compiled by XLA, with vLLM V1's behaviour in one Python process.

Importing the package imports no jax and touches no device; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM
    from jaxllm.beam_search import BeamSearchParams
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.llm import LLM
    from jaxllm.llm_engine import LLMEngine
    from jaxllm.logits_processor import LogitsProcessor
    from jaxllm.outputs import CompletionOutput, RequestOutput
    from jaxllm.pooling_outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )
    from jaxllm.pooling_params import PoolingParams
    from jaxllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "jaxllm.llm",
    "AsyncLLM": "jaxllm.async_llm",
    "LLMEngine": "jaxllm.llm_engine",
    "BeamSearchParams": "jaxllm.beam_search",
    "CompletionOutput": "jaxllm.outputs",
    "EngineArgs": "jaxllm.config.engine_args",
    "LogitsProcessor": "jaxllm.logits_processor",
    "RequestOutput": "jaxllm.outputs",
    "ClassificationRequestOutput": "jaxllm.pooling_outputs",
    "EmbeddingRequestOutput": "jaxllm.pooling_outputs",
    "PoolingRequestOutput": "jaxllm.pooling_outputs",
    "ScoringRequestOutput": "jaxllm.pooling_outputs",
    "PoolingParams": "jaxllm.pooling_params",
    "RequestOutputKind": "jaxllm.sampling_params",
    "SamplingParams": "jaxllm.sampling_params",
    "StructuredOutputsParams": "jaxllm.output_constraints",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "LLMEngine",
    "BeamSearchParams",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "LogitsProcessor",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
