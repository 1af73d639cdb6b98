"""jaxllm: an LLM inference engine compiled by XLA, with vLLM V1's behaviour in one Python process.

Importing the package imports no jax and touches no device; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM
    from jaxllm.beam_search import BeamSearchOutput, BeamSearchParams
    from jaxllm.config.command_line import FlexibleArgumentParser
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.inputs import ChatPrompt, TextPrompt, TokensPrompt
    from jaxllm.llm import LLM
    from jaxllm.llm_engine import LLMEngine
    from jaxllm.logits_processor import LogitsProcessor
    from jaxllm.output_constraints import RepetitionDetectionParams, StructuredOutputsParams
    from jaxllm.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxllm.planning.api import plan
    from jaxllm.planning.plan import Plan
    from jaxllm.pooling_outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from jaxllm.pooling_params import PoolingParams
    from jaxllm.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "jaxllm.async_llm",
    "BeamSearchOutput": "jaxllm.beam_search",
    "BeamSearchParams": "jaxllm.beam_search",
    "ChatPrompt": "jaxllm.inputs",
    "ClassificationOutput": "jaxllm.pooling_outputs",
    "ClassificationRequestOutput": "jaxllm.pooling_outputs",
    "CompletionOutput": "jaxllm.outputs",
    "EmbeddingOutput": "jaxllm.pooling_outputs",
    "EmbeddingRequestOutput": "jaxllm.pooling_outputs",
    "EngineArgs": "jaxllm.config.engine_args",
    "FlexibleArgumentParser": "jaxllm.config.command_line",
    "LLM": "jaxllm.llm",
    "LLMEngine": "jaxllm.llm_engine",
    "LogitsProcessor": "jaxllm.logits_processor",
    "Logprob": "jaxllm.outputs",
    "Plan": "jaxllm.planning.plan",
    "PoolingOutput": "jaxllm.pooling_outputs",
    "PoolingParams": "jaxllm.pooling_params",
    "PoolingRequestOutput": "jaxllm.pooling_outputs",
    "RepetitionDetectionParams": "jaxllm.output_constraints",
    "RequestOutput": "jaxllm.outputs",
    "RequestOutputKind": "jaxllm.sampling_params",
    "SamplingParams": "jaxllm.sampling_params",
    "ScoringOutput": "jaxllm.pooling_outputs",
    "ScoringRequestOutput": "jaxllm.pooling_outputs",
    "StructuredOutputsParams": "jaxllm.output_constraints",
    "TextPrompt": "jaxllm.inputs",
    "TokensPrompt": "jaxllm.inputs",
    "plan": "jaxllm.planning.api",
}

__all__ = [
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "ChatPrompt",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "FlexibleArgumentParser",
    "LLM",
    "LLMEngine",
    "LogitsProcessor",
    "Logprob",
    "Plan",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
