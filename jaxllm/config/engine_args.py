"""The engine's arguments: vLLM's names, checked and brought into one form."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.api import logits_processor, pooler
from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import LogitsProcessor
from jaxllm.api.pooler import PoolerConfig
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config import argument_checks as check
from jaxllm.config.argument import argument, switch
from jaxllm.config.arguments import ALIASES, attention_backend_of, known_names, refuse, report_without_effect
from jaxllm.config.cross_checks import check_together
from jaxllm.config.lora import LoRAArguments
from jaxllm.config.media import MediaLimit, domains, folder, media_limits
from jaxllm.config.parallel import ParallelConfig
from jaxllm.config.profiler import ProfilerConfig
from jaxllm.config.quantization import QuantizationConfig
from jaxllm.config.speculative import ENGINE_ARGUMENTS, SpeculativeConfig, gathered, speculative
from jaxllm.config.structured_outputs import ReasoningConfig, StructuredOutputsConfig, parser

if TYPE_CHECKING:
    from jaxllm.config.vllm_config import ModelConfig, VllmConfig

#: what vLLM's scripts run that name no model
SCRIPTS_MODEL = "Qwen/Qwen3-0.6B"


@dataclasses.dataclass(frozen=True)
class EngineArgs(ParallelConfig, QuantizationConfig, LoRAArguments):
    """What the engine is told, under vLLM's names and with its defaults, except where noted.

    Each argument is written once: a field with its check and its help, here or in the configuration of its concern.

    Construction checks every value and normalises it to the type of its field: counts may come as strings ("1k" is
    1000, "8K" is 8192, "25.6k" is 25600), bytes too ("4GiB", "500MB"), and None stands for the default.

    Those of vLLM's that are no field are taken as `engine_args` takes them.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range; the text names both.
    """

    model: str | os.PathLike[str] = argument(
        dataclasses.MISSING, check.place, "a named model, a local directory, a .gguf file, or a hub id", group="model"
    )
    _: dataclasses.KW_ONLY
    tokenizer: str | os.PathLike[str] | None = argument(
        None, check.place, "the tokenizer's directory, .gguf file or hub id (default: the model's)", group="model"
    )
    #: "fast" is an older name of "hf"
    tokenizer_mode: str = argument(
        "auto",
        check.one_of("auto", "hf", "slow", "mistral", fast="hf"),
        "whose files the tokenizer is read from; mistral (tekken.json) needs mistral_common",
        group="model",
    )
    skip_tokenizer_init: bool = switch(False, "run without a tokenizer: prompts are token ids", group="model")
    #: threads, while the engine runs; 0: the caller's own
    tokenizer_pool_size: int = argument(1, check.at_least(0), "threads that tokenize", group="model")
    revision: str | None = argument(
        None, check.text, "branch, tag or commit of a hub model (default: its main branch)", group="model"
    )
    tokenizer_revision: str | None = argument(
        None, check.text, "as --revision, of the tokenizer (default: the same)", group="model"
    )
    #: True: the one that is logged in
    hf_token: str | bool | None = argument(
        None, check.token, "the hub's access token (default: $HF_TOKEN, or who is logged in)", group="model", repr=False
    )
    hf_overrides: dict[str, Any] = argument(dict, check.mapping, "entries of config.json to replace", group="model")
    #: of the KV cache, too
    dtype: str = argument(
        "auto", check.dtype, "of weights and activations", group="model", form="{auto,float32,bfloat16,float16}"
    )
    #: "null" is `jaxllm.runner.null`
    load_format: str = argument(
        "auto",
        check.one_of(
            "auto", "safetensors", "pt", "gguf", "orbax", "mistral", "dummy", "null", hf="auto", sharded_state="auto"
        ),
        "the weights' form; pt: pytorch_model.bin; mistral: consolidated.safetensors; dummy: random ones; null: no "
        "model, which measures the host",
        group="model",
    )
    config_format: str = argument(
        "auto",
        check.one_of("auto", "hf", "mistral"),
        "whose config is read: hf: config.json; mistral: params.json; auto: the first where it exists",
        group="model",
    )
    #: of the dummy weights, too
    seed: int = argument(0, check.seed, "the engine's seed, from which every request gets its own", group="model")
    #: None: the model's own; `FIT_TO_MEMORY` (-1, "auto"): what fits
    max_model_len: int | None = argument(
        None,
        check.max_model_len,
        "longest prompt and output together, in tokens; auto: what fits into memory (default: the model's own)",
        group="model",
        form="N|auto",
    )
    #: None: the platform's, see `jaxllm.config.resolve`
    max_num_seqs: int | None = argument(
        None,
        check.max_num_seqs,
        "most requests in one step (default: 256; 1024 on a large GPU; 1 in a chat)",
        group="scheduler",
    )
    max_num_batched_tokens: int | None = argument(
        None,
        check.at_least(1),
        "most tokens in one step (default: 512 on a CPU; 8192 or 16384 on a GPU, by its size)",
        group="scheduler",
    )
    long_prefill_token_threshold: int = argument(
        0, check.at_least(0), "most prompt tokens of one request in a step; 0: no limit", group="scheduler"
    )
    long_prefill_token_threshold_adaptive: bool = switch(
        False, "let that limit be no less than a request's fair share of the step", group="scheduler"
    )
    max_num_active_seqs: int | None = argument(
        None,
        check.at_least(1),
        "most requests that run at once, of the max_num_seqs that there is room for (default: all of them)",
        group="scheduler",
    )
    scheduling_policy: str = argument(
        "fcfs",
        check.one_of("fcfs", "priority"),
        "who runs first: who came first, or whose priority is the smaller number",
        group="scheduler",
    )
    enable_chunked_prefill: bool = switch(True, "split long prompts over several steps", group="scheduler")
    enable_prefix_caching: bool = switch(True, "share the KV cache of equal prompt beginnings", group="cache")
    async_scheduling: bool = switch(True, "schedule a step while the one before runs", group="scheduler")
    scheduler_reserve_full_isl: bool = switch(
        True, "admit a prompt only when all of it fits into the free blocks", group="scheduler"
    )
    block_size: int | None = argument(
        None,
        check.block_size,
        "tokens in a KV-cache block (default: 64 on a CPU, 16 on a GPU)",
        group="cache",
        form="{8,16,32,64,128}",
    )
    gpu_memory_utilization: float = argument(
        0.9, check.share, "share of the device's memory that may be used, in (0, 1]", group="cache", form="SHARE"
    )
    #: in bytes
    kv_cache_memory_bytes: int | None = argument(
        None,
        check.at_least(1, check.size),
        "its size, such as 4GiB or 500MB (default: what gpu_memory_utilization leaves; at most 2 GiB on a CPU)",
        group="cache",
        form="BYTES",
    )
    #: block 0 is trash, so one block would hold nothing
    num_gpu_blocks_override: int | None = argument(
        None, check.at_least(2), "number of KV-cache blocks (default: as the memory plan finds)", group="cache"
    )
    #: in GiB, shared out among the replicas; 0 or None: nothing
    kv_offloading_size: float | None = argument(
        None,
        check.gibibytes,
        "host memory for blocks that leave the prefix cache, to come back on a hit: GiB, or such as 500MB (default: "
        "none). Not for weights, as --cpu-offload-gb is",
        group="cache",
        form="GIB",
    )
    #: of each device, in GiB
    cpu_offload_gb: float = argument(
        0.0,
        check.gibibytes,
        "weights of each GPU that lie in the host's memory, whole layers, copied in every step: GiB. "
        "Not for the KV cache, as old guides say: that is --kv-offloading-size",
        group="cache",
        form="GIB",
    )
    kv_offloading_backend: str = argument("native", check.one_of("native"), "what keeps these blocks", group="cache")
    enforce_eager: bool = switch(False, "compile as little as possible: starts sooner, runs slower", group="device")
    #: None: the platform's, see `jaxllm.config.resolve`
    num_decode_steps: int | None = argument(
        None,
        check.at_least(1),
        "most decode steps of one launch, where nobody waits and nothing is streamed (default: 1)",
        group="scheduler",
    )
    enable_prompt_embeds: bool = switch(
        False, 'take prompts that are vectors, {"prompt_embeds": array}, too', group="model"
    )
    #: modality -> `jaxllm.config.media.MediaLimit`
    limit_mm_per_prompt: dict[str, MediaLimit] = argument(
        dict,
        media_limits,
        'most items of a prompt, and the size that is planned for: {"image": 2}, or {"image": {"count": 2, "width": '
        '512, "height": 512}}; 0: none',
        group="model",
    )
    mm_processor_kwargs: dict[str, Any] = argument(
        dict, check.mapping, 'how images are prepared: {"min_pixels": 3136, "max_pixels": 1003520}', group="model"
    )
    #: in GiB
    mm_processor_cache_gb: float = argument(
        4.0, check.gibibytes, "memory of images that are prepared, in case they come again; 0: none", group="model"
    )
    disable_chunked_mm_input: bool = switch(
        False, "compute all tokens of an image in one step (Gemma 3's always are)", group="scheduler"
    )
    max_num_encoder_input_tokens: int | None = argument(
        None,
        check.at_least(1),
        "vectors of images that a step makes at most (default: max_num_batched_tokens)",
        group="scheduler",
    )
    allowed_local_media_path: str = argument(
        "", folder, "the folder whose files conversations may name as images", group="model", form="DIR"
    )
    allowed_media_domains: tuple[str, ...] = argument(
        (), domains, "hosts whose URLs conversations may name as images", group="model", form="JSON"
    )
    #: the same tokens and log-probabilities, to the bit; vLLM's VLLM_BATCH_INVARIANT
    deterministic: bool = switch(False, "the same bits for a request, whatever else runs; on a CPU", group="device")
    #: a request may ask for more
    stream_interval: int = argument(
        1, check.at_least(1), "tokens between two outputs of a streamed request", group="scheduler"
    )
    structured_outputs_config: StructuredOutputsConfig = check.part(
        StructuredOutputsConfig,
        'how grammars are read, as in vLLM: {"disable_any_whitespace": true}, for example',
        group="output",
    )
    reasoning_config: ReasoningConfig = check.part(
        ReasoningConfig, "the marks of reasoning: reasoning_start_str and reasoning_end_str", group="output"
    )
    #: as in the two configurations
    reasoning_parser: str = argument(
        "", parser, "whose marks of reasoning: a model family, as in vLLM", group="output", form="NAME"
    )
    max_logprobs: int = argument(
        20, check.max_logprobs, "most log-probabilities a request may ask for; -1: the vocabulary", group="output"
    )
    logprobs_mode: str = argument(
        "raw_logprobs",
        check.one_of("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
        "what is reported: before (raw) or after (processed) penalties, bias and temperature",
        group="output",
    )
    #: jax functions ``(logits, state) -> logits`` that run inside every step, or ``module:name`` of them; see
    #: `jaxllm.LogitsProcessor`
    logits_processors: tuple[LogitsProcessor, ...] = argument(
        (),
        logits_processor.logits_processors,
        "list of module:name of functions that change logits",
        group="output",
        form="JSON",
    )
    generation_config: str = argument(
        "auto",
        check.path_text,
        "where sampling defaults come from: auto (the model), vllm (nowhere), or a directory",
        group="output",
        form="auto|vllm|DIR",
    )
    override_generation_config: dict[str, Any] = argument(
        dict, check.mapping, "entries of generation_config.json to replace", group="output"
    )
    chat_template: str | None = argument(
        None, check.path_text, "a Jinja template, or its file (default: the model's)", group="model", form="TEXT|FILE"
    )
    runner: str = argument(
        "auto",
        check.one_of("auto", "generate", "pooling"),
        "pooling: embeddings, classes, scores",
        group="model",
    )
    convert: str = argument(
        "auto", check.one_of("auto", "none", "embed", "classify"), "how a model is made to pool", group="model"
    )
    task: str | None = argument(
        None,
        check.one_of("auto", "generate", "embed", "embedding", "classify", "score"),
        "older form of --runner and --convert (default: auto)",
        group="model",
    )
    pooler_config: PoolerConfig | None = argument(
        None,
        pooler.pooler_config,
        "how tokens are pooled, as in vLLM (default: as the model says)",
        group="output",
        form="JSON",
    )
    override_pooler_config: PoolerConfig | None = argument(
        None, pooler.pooler_config, "older name of --pooler-config (default: that)", group="output", form="JSON"
    )
    device: str = argument(
        "auto", check.one_of("auto", "cpu", "gpu", cuda="gpu"), "auto: a GPU where JAX has one", group="device"
    )
    #: "auto": what is known to be fastest on the device; "triton": kernels for NVIDIA GPUs; "mosaic": another one for
    #: prompts, on Hopper (H100, H200); names of vLLM's own, such as "FLASH_ATTN", stand for "auto"
    attention_backend: str = argument(
        "auto",
        check.attention_backend,
        "what attention is compiled to",
        group="device",
        form="{auto,xla,triton,mosaic}",
    )
    #: metrics are collected in any case; None: vLLM's default, True, as far as statistics go
    disable_log_stats: bool | None = switch(
        None,
        "log neither statistics every ten seconds nor advice on what hurt (default: advice, once of each kind)",
        group="observability",
    )
    #: 0: any free one
    metrics_port: int | None = argument(
        None,
        check.port,
        "serve Prometheus metrics at this port of the local machine; 0: any free one (default: do not)",
        group="observability",
        form="PORT",
    )
    profiler_config: ProfilerConfig = check.part(ProfilerConfig, "where profiles go, as in vLLM", group="observability")
    speculative_config: SpeculativeConfig | None = argument(
        None,
        speculative,
        'who drafts tokens for the model to verify, several in one step, as in vLLM: {"method": "ngram", '
        '"num_speculative_tokens": 5} (default: nobody)',
        group="scheduler",
        form="JSON",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together(self)
        if self.override_pooler_config is not None:
            object.__setattr__(self, "pooler_config", self.override_pooler_config)
            object.__setattr__(self, "override_pooler_config", None)

    def given(self) -> dict[str, Any]:
        """Arguments for an engine's constructor: those that are not None, which stands for the default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def hold(self) -> None:
        """An engine has been started with these: from here on, setting one raises AttributeError."""
        object.__setattr__(self, "_is_held", True)

    def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> VllmConfig:
        """What an engine of these arguments will be (`jaxllm.startup.engine_config`); what vLLM reports is ignored."""
        # by its name: arguments know nothing of models
        return importlib.import_module("jaxllm.startup.engine_config").engine_config(self)

    def create_model_config(self) -> ModelConfig:
        """The model's part of `create_engine_config`."""
        return self.create_engine_config().model_config

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every argument to a parser, as vLLM's scripts do; ``LLM(**vars(parser.parse_args()))`` takes them."""
        from jaxllm.config.command_line import add_engine_arguments

        help_text = EngineArgs.__dataclass_fields__["model"].metadata["help"]
        parser.add_argument("--model", default=SCRIPTS_MODEL, help=f"{help_text} (default: %(default)s)")
        add_engine_arguments(parser, defaults=True)
        return parser

    @classmethod
    def from_cli_args(cls, arguments: argparse.Namespace) -> EngineArgs:
        """The arguments that a parser with `add_cli_args` has read."""
        given = {name: value for name, value in vars(arguments).items() if name in all_names()}
        return engine_args(given.pop("model"), **given)


def argument_names() -> set[str]:
    """The arguments of `EngineArgs`."""
    return {field.name for field in dataclasses.fields(EngineArgs)}


def all_names() -> set[str]:
    """Those, and vLLM's others."""
    return argument_names() | known_names() | ENGINE_ARGUMENTS.keys()


def engine_args(model: str | os.PathLike[str], **arguments: Any) -> EngineArgs:
    """`EngineArgs` from vLLM's arguments. Those that have no effect here are named in one line of the log.

    Raises:
        TypeError: an argument that does not exist.
        ValidationError: a value that cannot be used, or an argument of a capability that jaxllm does not have yet.
    """
    _check_names("LLM", arguments)
    return EngineArgs(model, **arguments)


def _check_names(caller: str, arguments: Iterable[str]) -> None:
    known = all_names()
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_").lower(), sorted(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}.{hint}")


def _take_vllms_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of `EngineArgs` that vLLM's scripts call: with arguments that are no field, too."""

    @functools.wraps(init)
    def construct(self: EngineArgs, model: Any = None, **arguments: Any) -> None:
        _check_names("EngineArgs", arguments)
        for name, new in ALIASES.items():
            value = arguments.pop(name, None)
            if value is not None and arguments.setdefault(new, value) != value:
                raise ValidationError(f"{name} and {new} are two names of one thing; set one.")
        arguments = gathered(arguments)
        refuse(arguments)
        given, fields = attention_backend_of(arguments), argument_names()
        init(self, model, **{name: value for name, value in given.items() if name in fields})
        report_without_effect(given)

    return construct


def _assign(self: EngineArgs, name: str, value: Any) -> None:
    """Set an argument, as vLLM's scripts do before they start an engine: it is checked as the constructor checks it.
    An engine that has been started keeps those that it was started with.
    """
    _check_names("EngineArgs", [name])
    if getattr(self, "_is_held", False):
        refuse_to_set(name, value)
    given = self.given()
    if value is not None:  # under another name of it, it stands in place of the old one
        given.pop({**ALIASES, "override_pooler_config": "pooler_config"}.get(name, name), None)
    made = engine_args(**{**given, name: value})
    for field in dataclasses.fields(self):
        object.__setattr__(self, field.name, getattr(made, field.name))


EngineArgs.__init__ = _take_vllms_arguments(EngineArgs.__init__)
EngineArgs.__setattr__ = _assign


def refuse_stat_loggers(others: Mapping[str, Any]) -> None:
    """Raise ValidationError where vLLM's classes of statistics are given to an engine beside its arguments."""
    if others.get("stat_loggers"):
        raise ValidationError(
            "stat_loggers are not called: get_metrics() has the engine's numbers at any time, metrics_port=9400 serves "
            "them to Prometheus, and disable_log_stats=False logs a line every ten seconds. Leave stat_loggers out."
        )


def refuse_to_set(name: str, value: Any) -> None:
    """Raise AttributeError where the attribute that an engine's user sets is an argument: it would change nothing."""
    if name in all_names():
        raise AttributeError(
            f"{name} cannot be changed while the engine runs. End it with shutdown(), and start another: "
            f"LLM(model, {name}={value!r:.60})."
        )
    if name in {field.name for field in dataclasses.fields(SamplingParams)}:
        raise AttributeError(
            f"{name} is asked for with each call, not of the engine: SamplingParams({name}={value!r:.60})."
        )
