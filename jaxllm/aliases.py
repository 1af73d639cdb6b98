"""The module paths of vLLM, and the classes of jaxllm behind them: one table for both ways to run a vLLM script.

With only the package's name changed, ``from jaxllm.sampling_params import SamplingParams`` finds the class wherever it
lives (`AliasFinder`, which `jaxllm` puts behind Python's own finders). Unchanged, the script runs under
``python -m jaxllm.as_vllm``, which puts the same modules under the name ``vllm``. Each name is loaded when it is used;
one that jaxllm does not have is an ImportError that says so.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _in(home: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, home)


_SAMPLING = _in(
    "jaxllm.api.sampling_params",
    "SamplingParams",
    "StructuredOutputsParams",
    "RequestOutputKind",
    "RepetitionDetectionParams",
)
_PROMPTS = _in("jaxllm.api.inputs", "PromptType", "TextPrompt", "TokensPrompt")
_OUTPUTS = _in("jaxllm.api.outputs", "CompletionOutput", "RequestOutput", "RequestStateStats", "Logprob")
_POOLING = _in(
    "jaxllm.api.pooling_outputs",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "PoolingOutput",
    "PoolingRequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
)
_BEAM_SEARCH = _in("jaxllm.api.beam_search", "BeamSearchParams", "BeamSearchOutput", "BeamSearchSequence")
_PARSER = _in("jaxllm.config.command_line", "FlexibleArgumentParser")
_ENGINE_ARGS = _in("jaxllm.config.engine_args", "EngineArgs", "AsyncEngineArgs")

#: module of vLLM, "" for the package itself -> name -> the module of jaxllm that has it
MODULES: dict[str, dict[str, str]] = {
    "": {
        "__version__": "jaxllm",
        "LLM": "jaxllm.llm",
        "LLMEngine": "jaxllm.llm_engine",
        "AsyncLLMEngine": "jaxllm.async_llm",
        "PoolingParams": "jaxllm.api.pooling_params",
        "SamplingParams": "jaxllm.api.sampling_params",
        **_ENGINE_ARGS,
        **_OUTPUTS,
        **_POOLING,
        **_PROMPTS,
    },
    "beam_search": _BEAM_SEARCH,
    "config": {
        "PoolerConfig": "jaxllm.api.pooler",
        "StructuredOutputsConfig": "jaxllm.config.structured_outputs",
    },
    "distributed": {"cleanup_dist_env_and_memory": "jaxllm.aliases"},
    "engine": {},
    "engine.arg_utils": _ENGINE_ARGS,
    "engine.async_llm_engine": {"AsyncLLMEngine": "jaxllm.async_llm"},
    "engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "entrypoints": {},
    "entrypoints.llm": {"LLM": "jaxllm.llm"},
    "inputs": _PROMPTS,
    "logger": {"init_logger": "jaxllm.aliases"},
    "logprobs": _in("jaxllm.api.logprobs", "FlatLogprobs", "Logprob", "PromptLogprobs", "SampleLogprobs"),
    "outputs": {**_OUTPUTS, **_POOLING},
    "pooling_params": {"PoolingParams": "jaxllm.api.pooling_params"},
    "sampling_params": {**_SAMPLING, "BeamSearchParams": "jaxllm.api.beam_search"},
    "utils": _PARSER,
    "utils.argparse_utils": _PARSER,
    "utils.print_utils": {"print_embeddings": "jaxllm.aliases"},
    "v1": {},
    "v1.engine": {},
    "v1.engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "v1.engine.async_llm": {"AsyncLLM": "jaxllm.async_llm"},
    "v1.metrics": {},
    "v1.metrics.reader": _in("jaxllm.api.metric", "Counter", "Gauge", "Histogram", "Metric", "Vector"),
}
#: vLLM's name -> jaxllm's, where they differ
_RENAMED = {"AsyncEngineArgs": "EngineArgs", "AsyncLLMEngine": "AsyncLLM"}


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """vLLM's scripts call it between two engines. There is nothing to clean up: `LLM.shutdown` frees everything."""


def init_logger(name: str) -> Any:
    """vLLM's way to a logger: `logging.getLogger`."""
    import logging

    return logging.getLogger(name)


def print_embeddings(embeds: list[float], prefix: str = "Embeddings") -> None:
    """vLLM's examples print embeddings with it: the first four numbers, and how many there are."""
    shown = ", ".join([*map(str, embeds[:4]), *(["..."] if len(embeds) > 4 else [])])
    print(f"{prefix}: [{shown}] (size={len(embeds)})")


def attribute(path: str, name: str, *, package: str = "jaxllm") -> Any:
    """What vLLM's module `path` has under `name`. Raises ImportError, naming what is there, for anything else."""
    homes = MODULES[path]
    if name not in homes:
        if name.startswith("__"):
            raise AttributeError(name)
        module = f"{package}.{path}" if path else package
        raise ImportError(f"jaxllm has no {module}.{name}; of this module it has: {', '.join(homes) or 'none'}")
    return getattr(importlib.import_module(homes[name]), _RENAMED.get(name, name))


class AliasModule(ModuleType):
    """One of vLLM's modules, under ``vllm`` or ``jaxllm``."""

    def __init__(self, name: str):
        super().__init__(name, f"jaxllm under the name of {name}.")
        # It is a package, since it may have submodules.
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        package, _, path = self.__name__.partition(".")
        value = attribute(path, name, package=package)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(MODULES[self.__name__.partition(".")[2]])


class AliasFinder(MetaPathFinder, Loader):
    """Finds vLLM's submodules below ``jaxllm`` where jaxllm has none of that name itself."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = fullname.partition(".")
        if package != "jaxllm" or submodule not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """The module has its names already."""


def install_finder() -> None:
    """Put an `AliasFinder` behind Python's own finders, once."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
