"""jaxllm: an LLM inference engine compiled by XLA, with vLLM V1's behaviour in one Python process.

Importing the package imports no jax and touches no device; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxllm.aliases import MODULES, attribute, install_finder

if TYPE_CHECKING:
    from jaxllm.api.beam_search import BeamSearchOutput, BeamSearchParams
    from jaxllm.api.constraints import RepetitionDetectionParams, StructuredOutputsParams
    from jaxllm.api.inputs import ChatPrompt, EmbedsPrompt, TextPrompt, TokensPrompt
    from jaxllm.api.logits_processor import LogitsProcessor
    from jaxllm.api.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxllm.api.pooling_outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from jaxllm.api.pooling_params import LateChunkingParams, PoolingParams
    from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
    from jaxllm.async_llm import AsyncLLM
    from jaxllm.autotuning.api import tune
    from jaxllm.autotuning.result import TuningResult
    from jaxllm.config.command_line import FlexibleArgumentParser
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.llm import LLM
    from jaxllm.llm_engine import LLMEngine
    from jaxllm.planning.api import explain, plan
    from jaxllm.planning.explanation import Explanation
    from jaxllm.planning.plan import Plan
    from jaxllm.quantizing.api import quantize
    from jaxllm.quantizing.report import QuantizationReport

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "jaxllm.async_llm",
    "BeamSearchOutput": "jaxllm.api.beam_search",
    "BeamSearchParams": "jaxllm.api.beam_search",
    "ChatPrompt": "jaxllm.api.inputs",
    "ClassificationOutput": "jaxllm.api.pooling_outputs",
    "ClassificationRequestOutput": "jaxllm.api.pooling_outputs",
    "CompletionOutput": "jaxllm.api.outputs",
    "EmbeddingOutput": "jaxllm.api.pooling_outputs",
    "EmbeddingRequestOutput": "jaxllm.api.pooling_outputs",
    "EmbedsPrompt": "jaxllm.api.inputs",
    "EngineArgs": "jaxllm.config.engine_args",
    "Explanation": "jaxllm.planning.explanation",
    "FlexibleArgumentParser": "jaxllm.config.command_line",
    "LLM": "jaxllm.llm",
    "LLMEngine": "jaxllm.llm_engine",
    "LateChunkingParams": "jaxllm.api.pooling_params",
    "LogitsProcessor": "jaxllm.api.logits_processor",
    "Logprob": "jaxllm.api.outputs",
    "Plan": "jaxllm.planning.plan",
    "PoolingOutput": "jaxllm.api.pooling_outputs",
    "PoolingParams": "jaxllm.api.pooling_params",
    "PoolingRequestOutput": "jaxllm.api.pooling_outputs",
    "QuantizationReport": "jaxllm.quantizing.report",
    "RepetitionDetectionParams": "jaxllm.api.constraints",
    "RequestOutput": "jaxllm.api.outputs",
    "RequestOutputKind": "jaxllm.api.sampling_params",
    "SamplingParams": "jaxllm.api.sampling_params",
    "ScoringOutput": "jaxllm.api.pooling_outputs",
    "ScoringRequestOutput": "jaxllm.api.pooling_outputs",
    "StructuredOutputsParams": "jaxllm.api.constraints",
    "TextPrompt": "jaxllm.api.inputs",
    "TokensPrompt": "jaxllm.api.inputs",
    "TuningResult": "jaxllm.autotuning.result",
    "explain": "jaxllm.planning.api",
    "plan": "jaxllm.planning.api",
    "quantize": "jaxllm.quantizing.api",
    "tune": "jaxllm.autotuning.api",
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
    "EmbedsPrompt",
    "EngineArgs",
    "Explanation",
    "FlexibleArgumentParser",
    "LLM",
    "LLMEngine",
    "LateChunkingParams",
    "LogitsProcessor",
    "Logprob",
    "Plan",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "QuantizationReport",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "TuningResult",
    "__version__",
    "explain",
    "plan",
    "quantize",
    "tune",
]

install_finder()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from jaxllm.api.tracebacks import ShortTracebacks

        # by its name, as all that is found here: the contracts count what this module imports as imports of its parts
        whole_module = importlib.import_module("jaxllm.engine.interrupt").whole_module
        with ShortTracebacks():
            value = getattr(whole_module(_HOMES[name]), name)
    elif name in MODULES[""]:
        value = attribute("", name)
    else:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
