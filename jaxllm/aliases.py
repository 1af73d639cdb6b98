"""The module paths of vLLM, and the classes of jaxllm behind them: one table for both ways to run a vLLM script.

With only the package's name changed, ``from jaxllm.sampling_params import SamplingParams`` finds the class wherever it
lives (`AliasFinder`, which `jaxllm` puts behind Python's own finders). Unchanged, the script runs under
``python -m jaxllm.as_vllm``, which puts the same modules under the name ``vllm``. Each name is loaded when it is used;
one that has no meaning here is an error that says why: an ImportError where it is imported, and an AttributeError
elsewhere, so that `hasattr` answers.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Missing(str):
    """Why jaxllm does not have a name of vLLM's; it stands where the name's module would."""


def _in(home: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, home)


#: as a name: every name of the module that is not listed
REST = "*"

_TORCH_PROCESSORS: dict[str, str] = {
    REST: Missing(
        "vLLM's logits processors are torch classes; here they are jax functions (logits, state) -> logits, see "
        "jaxllm.LogitsProcessor"
    )
}
_ONE_PROCESS: dict[str, str] = {REST: Missing("jaxllm is one process, without workers that talk to each other")}
_NO_MEDIA: dict[str, str] = {REST: Missing("jaxllm does not take images, audio or video so far")}
_OWN_MODELS: dict[str, str] = {
    REST: Missing("jaxllm has its own models and its own loaders; see LLM.save, and load_format")
}
_NO_TRANSFER = Missing("keys and values stay in the engine: it hands them to nobody")
_NO_GRAPHS = Missing("XLA compiles every step, and there are no CUDA graphs; enforce_eager=True compiles least")
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

#: module of vLLM, "" for the package itself -> name -> the module of jaxllm that has it, or why none has (`Missing`)
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
    "assets": _NO_MEDIA,
    "assets.audio": _NO_MEDIA,
    "assets.image": _NO_MEDIA,
    "assets.video": _NO_MEDIA,
    "beam_search": _BEAM_SEARCH,
    "benchmarks": {},
    "benchmarks.datasets": {REST: Missing("jaxllm bench has its own data sets and takes a file of prompts")},
    "config": {
        "PoolerConfig": "jaxllm.api.pooler",
        "ProfilerConfig": "jaxllm.config.profiler",
        **_in("jaxllm.config.structured_outputs", "ReasoningConfig", "StructuredOutputsConfig"),
        "CompilationConfig": _NO_GRAPHS,
        "CompilationMode": _NO_GRAPHS,
        "CUDAGraphMode": _NO_GRAPHS,
        "AttentionConfig": Missing("attention_backend is the argument that names a kernel"),
        "KVEventsConfig": _NO_TRANSFER,
        "KVTransferConfig": _NO_TRANSFER,
    },
    "config.pooler": {"PoolerConfig": "jaxllm.api.pooler"},
    "distributed": {"cleanup_dist_env_and_memory": "jaxllm.aliases", **_ONE_PROCESS},
    "distributed.parallel_state": _ONE_PROCESS,
    "engine": {},
    "engine.arg_utils": _ENGINE_ARGS,
    "engine.async_llm_engine": {"AsyncLLMEngine": "jaxllm.async_llm"},
    "engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "entrypoints": {},
    "entrypoints.llm": {"LLM": "jaxllm.llm"},
    "envs": {REST: Missing("jaxllm reads no variables of vLLM's; what they set are arguments of LLM(...)")},
    # These three are jaxllm's own; scripts import public values by them, as they do by vLLM's paths.
    "errors": _in("jaxllm.api.errors", "JaxLLMError", "ValidationError", "FetchError", "ModelNotFoundError"),
    "logits_processor": {"LogitsProcessor": "jaxllm.api.logits_processor"},
    "output_constraints": _in("jaxllm.api.constraints", "RepetitionDetectionParams", "StructuredOutputsParams"),
    "inputs": {**_PROMPTS, "ChatPrompt": "jaxllm.api.inputs"},
    "logger": {"init_logger": "jaxllm.aliases"},
    "logprobs": _in("jaxllm.api.logprobs", "FlatLogprobs", "Logprob", "PromptLogprobs", "SampleLogprobs"),
    "lora": {},
    "lora.request": {"LoRARequest": Missing("jaxllm does not have LoRA so far")},
    "model_executor": _OWN_MODELS,
    "model_executor.model_loader": _OWN_MODELS,
    "model_executor.models": _OWN_MODELS,
    "multimodal": _NO_MEDIA,
    "multimodal.image": _NO_MEDIA,
    "multimodal.utils": _NO_MEDIA,
    "outputs": {**_OUTPUTS, **_POOLING},
    "platforms": _in("jaxllm.api.platform", "Platform", "current_platform"),
    "pooling_params": {"PoolingParams": "jaxllm.api.pooling_params"},
    "sampling_params": {**_SAMPLING, "BeamSearchParams": "jaxllm.api.beam_search"},
    "usage": {},
    "usage.usage_lib": {REST: Missing("jaxllm reports no usage to anybody; leave usage_context out")},
    "utils": _PARSER,
    "utils.argparse_utils": _PARSER,
    "utils.network_utils": _ONE_PROCESS,
    "utils.print_utils": {"print_embeddings": "jaxllm.aliases"},
    "v1": {},
    "v1.engine": {},
    "v1.engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "v1.engine.async_llm": {"AsyncLLM": "jaxllm.async_llm"},
    "v1.metrics": {},
    "v1.metrics.reader": _in("jaxllm.api.metric", "Counter", "Gauge", "Histogram", "Metric", "Vector"),
    "v1.sample": {},
    "v1.sample.logits_processor": _TORCH_PROCESSORS,
    "v1.sample.logits_processor.builtin": _TORCH_PROCESSORS,
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
    """What vLLM's module `path` has under `name`.

    Raises AttributeError for anything else, with the reason where there is one, or else with the names that are there.
    """
    if name.startswith("__") and name not in MODULES[path]:
        raise AttributeError(name)
    home = _home(path, name)
    if home is None or isinstance(home, Missing):
        raise AttributeError(_why_missing(path, name, package))
    return getattr(importlib.import_module(home), _RENAMED.get(name, name))


def _home(path: str, name: str) -> str | None:
    return MODULES[path].get(name) or MODULES[path].get(REST)


def _why_missing(path: str, name: str, package: str) -> str:
    module = f"{package}.{path}" if path else package
    reason = _home(path, name) or f"of this module it has: {', '.join(names(path)) or 'none'}"
    return f"jaxllm has no {module}.{name}; {reason}"


def names(path: str) -> list[str]:
    """The names that vLLM's module `path` has here."""
    return [name for name, home in MODULES[path].items() if not isinstance(home, Missing)]


class AliasModule(ModuleType):
    """One of vLLM's modules, under ``vllm`` or ``jaxllm``."""

    def __init__(self, name: str):
        super().__init__(name, f"jaxllm under the name of {name}.")
        # It is a package, since it may have submodules.
        self.__path__: list[str] = []
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        package, _, path = self.__name__.partition(".")
        value = attribute(path, name, package=package)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(names(self.__name__.partition(".")[2]))


class AliasFinder(MetaPathFinder, Loader):
    """Finds vLLM's submodules below ``jaxllm`` where jaxllm has none of that name itself.

    ``from vllm.config import Name`` looks for a submodule where the module has no such attribute, and forgets why it
    has none: so what is missing is said here once more.
    """

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = fullname.partition(".")
        if package == "jaxllm" and submodule in MODULES:
            return ModuleSpec(fullname, self, is_package=True)
        parent, _, name = submodule.rpartition(".")
        if parent in MODULES and self._explains(package, parent, name):
            raise ModuleNotFoundError(_why_missing(parent, name, package))
        return None

    def _explains(self, package: str, parent: str, name: str) -> bool:
        """Whether a missing name of a module is ours to explain: not where jaxllm has a package of this name itself, or
        vLLM is not jaxllm.
        """
        module = sys.modules.get(f"{package}.{parent}".rstrip("."))
        is_ours = package == "jaxllm" and isinstance(_home(parent, name), Missing)
        return is_ours or isinstance(module, AliasModule)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """The module has its names already."""


def install_finder() -> None:
    """Put an `AliasFinder` behind Python's own finders, once."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
