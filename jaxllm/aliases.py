"""The module paths of vLLM, and the classes of jaxllm behind them: one table for both ways to run a vLLM script.

With only the package's name changed, ``from jaxllm.sampling_params import SamplingParams`` finds the class wherever it
lives (`AliasFinder`, which `jaxllm` puts behind Python's own finders). Unchanged, the script runs under
``python -m jaxllm.as_vllm``, which finds the same modules under the name ``vllm``. Each name is loaded when it is used;
one that has no meaning here is an error that says why: an ImportError where it is imported, and an AttributeError
elsewhere, so that `hasattr` answers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Missing(str):
    """Why jaxllm does not have a name of vLLM's; it stands where the name's module would."""


#: as a name: every name of the module that is not listed
REST = "*"


def _in(home: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, home)


def _nothing(why: str) -> dict[str, str]:
    return {REST: Missing(why)}


#: what vLLM's example of a processor is here: requests that name a token get no other one
JAX_PROCESSOR = (
    "LogitsProcessor(lambda logits, state: jnp.where((state.extra_args['target_token'][:, None] < 0) | "
    "(jnp.arange(logits.shape[1]) == state.extra_args['target_token'][:, None]), logits, -jnp.inf), "
    "extra_args={'target_token': -1})"
)
_TORCH_PROCESSORS = {
    **_in(
        "jaxllm.api.torch_logits_processor",
        *("AdapterLogitsProcessor", "BatchUpdate", "LogitsProcessor", "MoveDirectionality", "RequestLogitsProcessor"),
        "process_dict_updates",
    ),
    REST: Missing("BatchUpdate, LogitsProcessor, AdapterLogitsProcessor and process_dict_updates are what jaxllm has"),
}
_NEW_PROCESSORS = _nothing(
    "jaxllm has the classes of vllm.v1.sample.logits_processor (update_state, apply), and jax functions "
    f"(logits, state) -> logits: LLM(..., logits_processors=[{JAX_PROCESSOR}]), see jaxllm.LogitsProcessor"
)
_ONE_PROCESS = _nothing("jaxllm is one process, without workers that talk to each other")
_NO_SERVER = _nothing(
    "the server is a command, jaxllm serve; AsyncLLM is for asyncio programs, jaxllm run-batch for files"
)
_NO_AUDIO = _nothing("jaxllm takes no audio")
_NO_MEDIA = _nothing(
    "a prompt's pictures and videos are paths, a file's bytes, arrays or pictures of Pillow's: "
    "{'prompt': ..., 'multi_modal_data': {'image': ...}}; audio is not taken"
)
_NO_RESOLVERS = _nothing("an adapter is a folder: LoRARequest(lora_name, lora_int_id, lora_path)")
_OWN_MODELS = _nothing("jaxllm has its own models and its own loaders; see LLM.save, and load_format")
_NO_TRANSFER = _nothing("keys and values stay in the engine: it hands them to nobody")
_IN_PLACE = _nothing("weights are replaced in this process: LLM.update_weights(params), see also jaxllm.flax")
_INSIDE = _nothing("it is inside vLLM's engine, and jaxllm's is another")
_TORCH = _nothing(f"no torch is involved; a logits processor is a jax function: {JAX_PROCESSOR}")
_SAMPLING = _in(
    "jaxllm.api.sampling_params",
    "SamplingParams",
    "StructuredOutputsParams",
    "RequestOutputKind",
    "RepetitionDetectionParams",
)
_GUIDED = Missing(
    "StructuredOutputsParams has the same fields: SamplingParams(structured_outputs=StructuredOutputsParams(...))"
)
_PROMPTS = _in(
    "jaxllm.api.inputs",
    *("EmbedsPrompt", "PromptInputs", "PromptType", "SingletonPrompt", "TextPrompt", "TokensPrompt"),
)
_OUTPUTS = _in("jaxllm.api.outputs", "CompletionOutput", "RequestOutput", "RequestStateStats", "Logprob")
_POOLING = _in(
    "jaxllm.api.pooling_outputs",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LateChunk",
    "LateChunkingMetadata",
    "PoolingOutput",
    "PoolingRequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
)
_BEAM_SEARCH = _in("jaxllm.api.beam_search", "BeamSearchParams", "BeamSearchOutput", "BeamSearchSequence")
_PARSER = _in("jaxllm.config.command_line", "FlexibleArgumentParser")
_ENGINE_ARGS = _in("jaxllm.config.engine_args", "EngineArgs", "AsyncEngineArgs")
_COMPILATION = _in("jaxllm.config.compilation_config", "CompilationConfig", "CompilationMode", "CUDAGraphMode")
_CHAT_TEMPLATES = _in("jaxllm.tokenization.chat", "load_chat_template")
_RESOLVED_TEMPLATES = _in("jaxllm.vllm_functions", "resolve_hf_chat_template", "resolve_chat_template")
_LOGPROBS = _in("jaxllm.api.logprobs", "FlatLogprobs", "Logprob", "PromptLogprobs", "SampleLogprobs")
_TOKENIZERS = {
    **_in("transformers", "AnyTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizerBase"),
    **_in("transformers", "TokenizerLike"),
    "get_tokenizer": "jaxllm.vllm_functions",
    REST: Missing("LLM.get_tokenizer() is the engine's; transformers.AutoTokenizer makes others"),
}
#: nothing is left of it when an engine is shut down
_ENDING = ("cleanup_dist_env_and_memory", "destroy_distributed_environment", "destroy_model_parallel")
_ARITHMETIC = _in("jaxllm.vllm_functions", "cdiv", "round_up")
_BYTES = _in("jaxllm.vllm_functions", "GiB_bytes", "MiB_bytes")
_PORTS = _in("jaxllm.vllm_functions", "get_ip", "get_open_port")
_RANDOM_SEED = _in("jaxllm.vllm_functions", "set_random_seed")

#: module of vLLM, "" for the package itself -> name -> the module of jaxllm that has it, or why none has (`Missing`)
MODULES: dict[str, dict[str, str]] = {
    "": {
        "__version__": "jaxllm",
        "LLM": "jaxllm.llm",
        "LLMEngine": "jaxllm.llm_engine",
        "AsyncLLMEngine": "jaxllm.async_llm",
        "ModelRegistry": _OWN_MODELS[REST],
        "PoolingParams": "jaxllm.api.pooling_params",
        "SamplingParams": "jaxllm.api.sampling_params",
        "initialize_ray_cluster": _ONE_PROCESS[REST],
        **_ENGINE_ARGS,
        **_OUTPUTS,
        **_POOLING,
        **_PROMPTS,
    },
    "assets": _NO_MEDIA,
    "attention": _INSIDE,
    "beam_search": _BEAM_SEARCH,
    "benchmarks": {},
    "benchmarks.datasets": _nothing("jaxllm bench has its own data sets and takes a file of prompts"),
    "config": {
        "PoolerConfig": "jaxllm.api.pooler",
        "ProfilerConfig": "jaxllm.config.profiler",
        "SchedulerConfig": "jaxllm.config.scheduler",
        **_in("jaxllm.config.structured_outputs", "ReasoningConfig", "StructuredOutputsConfig"),
        **_in("jaxllm.config.speculative", "SpeculativeConfig"),
        **_in("jaxllm.config.vllm_config", "CacheConfig", "ModelConfig", "ParallelConfig", "VllmConfig"),
        **_COMPILATION,
        "AttentionConfig": Missing("attention_backend is the argument that names a kernel"),
        "KernelConfig": Missing("attention_backend is the argument that names a kernel"),
        "KVEventsConfig": _NO_TRANSFER[REST],
        "KVTransferConfig": _NO_TRANSFER[REST],
        **dict.fromkeys(
            ("DecodingConfig", "DeviceConfig", "LoadConfig", "ObservabilityConfig", "QuantizationConfig"),
            Missing("what it holds are arguments of LLM(...), by the same names"),
        ),
        "CompilationLevel": Missing("it is CompilationMode, without an effect: XLA compiles every step"),
        **dict.fromkeys(("get_current_vllm_config", "set_current_vllm_config"), _INSIDE[REST]),
        "LoRAConfig": Missing("enable_lora, max_loras, max_lora_rank, ... are arguments of LLM(...)"),
        "PassConfig": Missing("XLA has passes of its own"),
        "SpeechToTextConfig": _NO_AUDIO[REST],
        "WeightTransferConfig": _IN_PLACE[REST],
    },
    "config.compilation": {**_COMPILATION, REST: Missing("XLA compiles every step, for the shapes of its buckets")},
    "config.kv_transfer": _NO_TRANSFER,
    "config.pooler": {"PoolerConfig": "jaxllm.api.pooler"},
    "config.speech_to_text": _NO_AUDIO,
    "collect_env": _nothing("jaxllm doctor says what is installed"),
    "core": _INSIDE,
    "device_allocator": _nothing("LLM.sleep and LLM.wake_up give the device's memory back and take it"),
    "distributed": {**_in("jaxllm.vllm_functions", *_ENDING), **_ONE_PROCESS},
    "distributed.kv_transfer": _NO_TRANSFER,
    "distributed.parallel_state": {**_in("jaxllm.vllm_functions", *_ENDING), **_ONE_PROCESS},
    "distributed.weight_transfer": _IN_PLACE,
    "engine": {},
    "engine.arg_utils": _ENGINE_ARGS,
    "engine.async_llm_engine": {"AsyncLLMEngine": "jaxllm.async_llm", "AsyncEngineDeadError": "builtins"},
    "engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "engine.metrics": _INSIDE,
    "engine.protocol": {"EngineClient": "jaxllm.async_llm"},
    "entrypoints": {},
    "entrypoints.chat_utils": {
        **_CHAT_TEMPLATES,
        **_RESOLVED_TEMPLATES,
        REST: Missing("LLM.chat takes messages, and get_tokenizer().apply_chat_template writes them"),
    },
    "entrypoints.launchers": _NO_SERVER,
    "entrypoints.llm": {"LLM": "jaxllm.llm"},
    "entrypoints.openai": _NO_SERVER,
    "entrypoints.openai.chat_completion": _NO_SERVER,
    "entrypoints.openai.engine": _NO_SERVER,
    "entrypoints.pooling": _NO_SERVER,
    "entrypoints.score_utils": _NO_MEDIA,
    "entrypoints.serve": _NO_SERVER,
    "entrypoints.utils": _NO_SERVER,
    "envs": _nothing("jaxllm reads no variables of vLLM's; what they set are arguments of LLM(...)"),
    # These three are jaxllm's own; scripts import public values by them, as they do by vLLM's paths.
    "errors": _in("jaxllm.api.errors", "JaxLLMError", "ValidationError", "FetchError", "ModelNotFoundError"),
    "exceptions": _in("jaxllm.api.errors", "VLLMError", "VLLMValidationError"),
    "executor": _ONE_PROCESS,
    "logits_processor": {"LogitsProcessor": "jaxllm.api.logits_processor"},
    "output_constraints": _in("jaxllm.api.constraints", "RepetitionDetectionParams", "StructuredOutputsParams"),
    "forward_context": _INSIDE,
    "inputs": {
        **_PROMPTS,
        "ChatPrompt": "jaxllm.api.inputs",
        **dict.fromkeys(
            ("ExplicitEncoderDecoderPrompt", "build_explicit_enc_dec_prompt", "zip_enc_dec_prompts"),
            Missing("no model here has an encoder for prompts beside its decoder (T5, BART, Whisper): a prompt is one"),
        ),
    },
    "inputs.data": _PROMPTS,
    "ir": _INSIDE,
    "logits_process": _TORCH_PROCESSORS,
    "logger": {"init_logger": "jaxllm.vllm_functions"},
    "logprobs": _LOGPROBS,
    "lora": _NO_RESOLVERS,
    "lora.request": {"LoRARequest": "jaxllm.api.lora_request"},
    "model_executor": {**_RANDOM_SEED, **_OWN_MODELS},
    "model_executor.utils": {**_RANDOM_SEED, **_OWN_MODELS},
    "model_executor.model_loader": {"ShardedStateLoader": "jaxllm.vllm_functions", **_OWN_MODELS},
    "model_executor.determinism": _nothing("deterministic=True is an argument of LLM"),
    "multimodal": _NO_MEDIA,
    "multimodal.image": {"convert_image_mode": "jaxllm.multimodal.pictures", **_NO_MEDIA},
    "multimodal.utils": {
        **_in("jaxllm.multimodal.access", "encode_image_url", "fetch_image"),
        "encode_image_base64": "jaxllm.vllm_functions",
        **_NO_MEDIA,
    },
    "outputs": {**_OUTPUTS, **_POOLING},
    "platforms": _in("jaxllm.api.platform", "Platform", "current_platform"),
    "plugins": _nothing("jaxllm has no plugins: a model family is a file of its own (jaxllm/models/README.md)"),
    "pooling_params": _in("jaxllm.api.pooling_params", "LateChunkingParams", "PoolingParams"),
    "reasoning": _nothing("a reasoning parser is the marks around reasoning: reasoning_parser, or reasoning_config"),
    "renderers": {},
    "renderers.chat_utils": _CHAT_TEMPLATES,
    "renderers.hf": _RESOLVED_TEMPLATES,
    "sampling_params": {
        **_SAMPLING,
        "BeamSearchParams": "jaxllm.api.beam_search",
        "GuidedDecodingParams": _GUIDED,
    },
    "scripts": _nothing("the command is jaxllm"),
    "sequence": _LOGPROBS,
    "spec_decode": _INSIDE,
    "tasks": _nothing("the names of tasks are strings"),
    "tokenizers": _TOKENIZERS,
    "tool_parsers": _nothing("tool_call_parser is the name of one: jaxllm serve --help lists them"),
    "transformers_utils": _nothing("transformers itself has it: AutoConfig, AutoTokenizer, and huggingface_hub"),
    "transformers_utils.tokenizer": _TOKENIZERS,
    "transformers_utils.repo_utils": {"hf_api": "jaxllm.vllm_functions"},
    "usage": {},
    "usage.usage_lib": {"UsageContext": "jaxllm.vllm_functions"},
    "utils": {
        **_PARSER,
        **_ARITHMETIC,
        **_BYTES,
        **_PORTS,
        "random_uuid": "jaxllm.vllm_functions",
        REST: _INSIDE[REST],
    },
    "utils.argparse_utils": _PARSER,
    "utils.gpu_sync_debug": _TORCH,
    "utils.math_utils": _ARITHMETIC,
    "utils.mem_constants": _BYTES,
    "utils.network_utils": {**_PORTS, **_ONE_PROCESS},
    "utils.print_utils": {"print_embeddings": "jaxllm.vllm_functions"},
    "utils.serial_utils": _NO_SERVER,
    "utils.system_utils": _NO_SERVER,
    "utils.torch_utils": {**_RANDOM_SEED, **_TORCH},
    "v1": {},
    "v1.attention": _INSIDE,
    "v1.core": _INSIDE,
    "v1.engine": {},
    "v1.engine.exceptions": _in("builtins", "EngineDeadError", "EngineGenerateError"),
    "v1.engine.llm_engine": {"LLMEngine": "jaxllm.llm_engine"},
    "v1.engine.async_llm": {"AsyncLLM": "jaxllm.async_llm"},
    "v1.executor": _ONE_PROCESS,
    "v1.kv_cache_interface": _INSIDE,
    "v1.kv_offload": _INSIDE,
    "v1.metrics": {},
    "v1.metrics.loggers": _nothing("LLM.serve_metrics and disable_log_stats=False are what shows metrics"),
    "v1.metrics.reader": _in("jaxllm.api.metric", "Counter", "Gauge", "Histogram", "Metric", "Vector"),
    "v1.request": _INSIDE,
    "v1.sample": {},
    **dict.fromkeys(
        tuple(f"v1.sample.logits_processor{part}" for part in ("", ".builtin", ".interface")), _TORCH_PROCESSORS
    ),
    "v1.watermarking": _nothing("jaxllm does not mark what it generates"),
    "v1.worker": _INSIDE,
    "v1.worker.gpu": _INSIDE,
    "v1.worker.gpu.sample": _INSIDE,
    "v1.worker.gpu.sample.logits_processor": _NEW_PROCESSORS,
    "version": {"__version__": "jaxllm"},
    "worker": _INSIDE,
}
#: vLLM's name -> jaxllm's, where they differ
_RENAMED = {
    "AsyncEngineArgs": "EngineArgs",
    **dict.fromkeys(("AsyncLLMEngine", "EngineClient"), "AsyncLLM"),
    **dict.fromkeys(("PromptInputs", "SingletonPrompt"), "PromptType"),
    **dict.fromkeys(("AnyTokenizer", "TokenizerBase", "TokenizerLike"), "PreTrainedTokenizerBase"),
    # what waits on an engine that failed gets
    **dict.fromkeys(("AsyncEngineDeadError", "EngineDeadError", "EngineGenerateError"), "RuntimeError"),
    "VLLMError": "JaxLLMError",
    "VLLMValidationError": "ValidationError",
}
#: what the names are those of; libraries ask for it before they use vLLM
VLLM_VERSION = "0.33.0+jaxllm"


def attribute(path: str, name: str, *, package: str = "jaxllm") -> Any:
    """What vLLM's module `path` has under `name`.

    Raises AttributeError for anything else, with the reason where there is one, or else with the names that are there.
    """
    if name.startswith("__") and name not in MODULES[path]:
        raise AttributeError(name)
    submodule = f"{path}.{name}" if path else name
    if submodule in MODULES and name not in MODULES[path]:
        return importlib.import_module(f"{package}.{submodule}")
    if (package, name) == ("vllm", "__version__"):
        return VLLM_VERSION
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
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        package, _, path = self.__name__.partition(".")
        value = attribute(path, name, package=package)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(names(self.__name__.partition(".")[2]))


class VllmDistribution(importlib.metadata.Distribution):
    """What ``importlib.metadata.version("vllm")`` finds, which libraries ask before they import vLLM."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(f"vllm is jaxllm under another name, and has no file {path}")


class AliasFinder(importlib.metadata.DistributionFinder, Loader):
    """Finds vLLM's modules under the name of `package`, which is "vllm", or "jaxllm", whose own ones come first.

    ``from vllm.config import Name`` looks for a submodule where the module has no such attribute, and forgets why it
    has none: so what is missing is said here once more.
    """

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = fullname.partition(".")
        if package != self.package:
            return None
        if submodule in MODULES:
            # it is a package, since it may have submodules
            return ModuleSpec(fullname, self, is_package=True)
        parent, _, name = submodule.rpartition(".")
        if parent in MODULES and self._explains(parent, name):
            raise ModuleNotFoundError(_why_missing(parent, name, package))
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        asked = getattr(context, "name", None)
        return [VllmDistribution()] if asked == self.package == "vllm" else []

    def _explains(self, parent: str, name: str) -> bool:
        """Whether what a module lacks is ours to explain: not in jaxllm's own modules, but for names of vLLM's."""
        module = sys.modules.get(f"{self.package}.{parent}".rstrip("."))
        return isinstance(_home(parent, name), Missing) or isinstance(module, AliasModule)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """The module has its names already."""


def install_finder() -> None:
    """Put an `AliasFinder` of ``jaxllm`` behind Python's own finders, once."""
    if not any(isinstance(finder, AliasFinder) and finder.package == "jaxllm" for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder("jaxllm"))
