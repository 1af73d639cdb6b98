"""Lets a script that imports vllm run on jaxllm: ``import jaxllm.as_vllm`` before it imports anything of vllm.

Afterwards ``vllm`` and the submodules below are jaxllm's classes under vLLM's names, in this process only. Each name is
loaded when it is used; one that jaxllm does not have is an ImportError that says so.

    python -m jaxllm.as_vllm script.py [arguments]

runs a script that way without changing it.
"""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from types import ModuleType
from typing import Any

_SAMPLING = {
    name: "jaxllm.sampling_params"
    for name in ("SamplingParams", "StructuredOutputsParams", "RequestOutputKind", "RepetitionDetectionParams")
}
_PROMPTS = {name: "jaxllm.inputs" for name in ("PromptType", "TextPrompt", "TokensPrompt")}
_OUTPUTS = {name: "jaxllm.outputs" for name in ("CompletionOutput", "RequestOutput", "RequestStateStats", "Logprob")}
_POOLING = {
    name: "jaxllm.pooling_outputs"
    for name in (
        "ClassificationOutput",
        "ClassificationRequestOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "PoolingOutput",
        "PoolingRequestOutput",
        "ScoringOutput",
        "ScoringRequestOutput",
    )
}
_BEAM_SEARCH = {name: "jaxllm.beam_search" for name in ("BeamSearchParams", "BeamSearchOutput", "BeamSearchSequence")}
_PARSER = {"FlexibleArgumentParser": "jaxllm.config.command_line"}

#: module of vLLM -> name -> the module of jaxllm that has it
MODULES: dict[str, dict[str, str]] = {
    "vllm": {
        "__version__": "jaxllm",
        "LLM": "jaxllm.llm",
        "LLMEngine": "jaxllm.llm_engine",
        "AsyncLLMEngine": "jaxllm.async_llm",
        "EngineArgs": "jaxllm.config.engine_args",
        "AsyncEngineArgs": "jaxllm.config.engine_args",
        "PoolingParams": "jaxllm.pooling_params",
        "SamplingParams": "jaxllm.sampling_params",
        **_OUTPUTS,
        **_POOLING,
        **_PROMPTS,
    },
    "vllm.beam_search": _BEAM_SEARCH,
    "vllm.config": {
        "PoolerConfig": "jaxllm.config.pooler",
        "StructuredOutputsConfig": "jaxllm.config.structured_outputs",
    },
    "vllm.distributed": {"cleanup_dist_env_and_memory": "jaxllm.as_vllm"},
    "vllm.engine": {},
    "vllm.engine.arg_utils": {
        "EngineArgs": "jaxllm.config.engine_args",
        "AsyncEngineArgs": "jaxllm.config.engine_args",
    },
    "vllm.engine.async_llm_engine": {"AsyncLLMEngine": "jaxllm.async_llm"},
    "vllm.engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "vllm.entrypoints": {},
    "vllm.entrypoints.llm": {"LLM": "jaxllm.llm"},
    "vllm.inputs": _PROMPTS,
    "vllm.logger": {"init_logger": "jaxllm.as_vllm"},
    "vllm.logprobs": dict.fromkeys(("FlatLogprobs", "Logprob", "PromptLogprobs", "SampleLogprobs"), "jaxllm.logprobs"),
    "vllm.outputs": {**_OUTPUTS, **_POOLING},
    "vllm.pooling_params": {"PoolingParams": "jaxllm.pooling_params"},
    "vllm.sampling_params": {**_SAMPLING, "BeamSearchParams": "jaxllm.beam_search"},
    "vllm.utils": _PARSER,
    "vllm.utils.argparse_utils": _PARSER,
    "vllm.utils.print_utils": {"print_embeddings": "jaxllm.as_vllm"},
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "vllm.v1.engine.async_llm": {"AsyncLLM": "jaxllm.async_llm"},
    "vllm.v1.metrics": {},
    "vllm.v1.metrics.reader": {
        name: "jaxllm.engine.metrics" for name in ("Counter", "Gauge", "Histogram", "Metric", "Vector")
    },
}
#: vLLM's name -> jaxllm's, where they differ
_RENAMED = {"AsyncEngineArgs": "EngineArgs", "AsyncLLMEngine": "AsyncLLM"}


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """vLLM's scripts call it between two engines. There is nothing to clean up: `LLM.shutdown` frees everything."""


def init_logger(name: str) -> logging.Logger:
    """vLLM's way to a logger."""
    return logging.getLogger(name)


def print_embeddings(embeds: list[float], prefix: str = "Embeddings") -> None:
    """vLLM's examples print embeddings with it: the first four numbers, and how many there are."""
    shown = ", ".join([*map(str, embeds[:4]), *(["..."] if len(embeds) > 4 else [])])
    print(f"{prefix}: [{shown}] (size={len(embeds)})")


class _Module(ModuleType):
    """One of vLLM's modules."""

    def __init__(self, name: str, homes: dict[str, str]):
        super().__init__(name, f"jaxllm under the name of {name}.")
        self._homes = homes
        # a package: it may have submodules
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        home = self.__dict__.get("_homes", {}).get(name)
        if home is None:
            if name.startswith("__"):
                raise AttributeError(name)
            known = ", ".join(self.__dict__["_homes"]) or "none"
            raise ImportError(f"jaxllm has no {self.__name__}.{name}; of this module it has: {known}")
        value = getattr(importlib.import_module(home), _RENAMED.get(name, name))
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__["_homes"])


def install() -> None:
    """Make ``import vllm`` mean jaxllm. Raises ImportError when vllm itself has been imported already."""
    loaded = sys.modules.get("vllm")
    if loaded is not None and not isinstance(loaded, _Module):
        raise ImportError("vllm itself has been imported already; import jaxllm.as_vllm before it")
    for name, homes in MODULES.items():
        module = sys.modules.setdefault(name, _Module(name, homes))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def main() -> None:
    """Run the script that the command line names, with its arguments."""
    usage = "usage: python -m jaxllm.as_vllm script.py [arguments]"
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) < 2:
        raise SystemExit(usage)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    # under its own name, so that the script's imports find the same module
    importlib.import_module("jaxllm.as_vllm")
    main()
else:
    install()
