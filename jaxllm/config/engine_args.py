"""The engine's arguments: vLLM's names, checked and brought into one form."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import LogitsProcessor
from jaxllm.api.pooler import PoolerConfig
from jaxllm.config.argument_checks import CHECKS
from jaxllm.config.arguments import ALIASES, attention_backend_of, known_names, refuse, report_without_effect
from jaxllm.config.profiler import ProfilerConfig
from jaxllm.config.structured_outputs import ReasoningConfig, StructuredOutputsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What the engine is told, under vLLM's names and with its defaults, except where noted.

    Construction checks every value and normalises it to the type of its field: counts may come as strings ("1k" is
    1000, "8K" is 8192, "25.6k" is 25600), and None stands for the default.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range; the text names both.
    """

    #: a named model, a local directory, a .gguf file, or a hub id
    model: str | os.PathLike[str]
    #: as `model`, for the tokenizer alone; None: the model's
    tokenizer: str | os.PathLike[str] | None = None
    skip_tokenizer_init: bool = False
    #: threads that tokenize while the engine runs; 0: the caller's own
    tokenizer_pool_size: int = 1
    #: branch, tag or commit; hub ids only
    revision: str | None = None
    tokenizer_revision: str | None = None
    #: the hub's access token; True: the one that is logged in
    hf_token: str | bool | None = dataclasses.field(default=None, repr=False)
    #: entries of the model's config.json to replace
    hf_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: "auto", "float32", "bfloat16" or "float16", of weights, activations and KV cache
    dtype: str = "auto"
    #: "dummy": random weights; "null": no model at all, to measure the host (`jaxllm.runner.null`)
    load_format: str = "auto"
    #: of the dummy weights, and of requests without one of their own
    seed: int = 0
    #: prompt and output together, in tokens; None: the model's own; `FIT_TO_MEMORY` (-1, "auto"): what fits
    max_model_len: int | None = None
    #: None: the platform's, see `jaxllm.config.resolve`
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    #: 0: no limit
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    #: admit a prompt only when all of it fits into the free blocks
    scheduler_reserve_full_isl: bool = True
    #: tokens; a power of two in [8, 128]; None: 64 on a CPU, 16 on a GPU
    block_size: int | None = None
    #: in (0, 1]
    gpu_memory_utilization: float = 0.9
    #: bytes of the KV cache, in place of `gpu_memory_utilization`
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    #: compile as little as possible
    enforce_eager: bool = False
    #: most decode steps of one launch; None: the platform's, see `jaxllm.config.resolve`
    num_decode_steps: int | None = None
    #: the same tokens and log-probabilities, to the bit, whatever else runs; vLLM's VLLM_BATCH_INVARIANT. CPU only
    deterministic: bool = False
    #: tokens between two outputs of a streamed request; a request may ask for more
    stream_interval: int = 1
    #: a dict of its fields will do
    structured_outputs_config: StructuredOutputsConfig = dataclasses.field(default_factory=StructuredOutputsConfig)
    #: a dict of its fields will do
    reasoning_config: ReasoningConfig = dataclasses.field(default_factory=ReasoningConfig)
    #: names the marks around the model's reasoning, as in the two configurations
    reasoning_parser: str = ""
    #: most `logprobs` that a request may ask for; -1: the vocabulary
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    #: jax functions ``(logits, state) -> logits`` that run inside every step, or ``module:name`` of them; see
    #: `jaxllm.LogitsProcessor`
    logits_processors: tuple[LogitsProcessor, ...] = ()
    #: where sampling defaults come from: "auto" (the model), "vllm" (nowhere), or a directory
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: a Jinja template or its file, in place of the model's
    chat_template: str | None = None
    #: "auto", "generate" or "pooling": whether the engine generates text or makes vectors and classes
    runner: str = "auto"
    #: how a model is made to pool: "auto", "none", "embed" or "classify"
    convert: str = "auto"
    #: older form of `runner` and `convert`: "auto", "generate", "embed", "classify" or "score"
    task: str | None = None
    pooler_config: PoolerConfig | None = None
    #: older name of `pooler_config`
    override_pooler_config: PoolerConfig | None = None
    #: "auto", "cpu" or "gpu"
    device: str = "auto"
    #: devices that share the model; a CPU becomes as many
    tensor_parallel_size: int = 1
    #: what attention is compiled to: "auto" (what is known to be fastest on the device), "xla", "triton" (kernels for
    #: NVIDIA GPUs) or "mosaic" (another one for prompts, on Hopper: H100, H200); names of vLLM's own, such as
    #: "FLASH_ATTN", stand for "auto"
    attention_backend: str = "auto"
    #: False logs a line of statistics every 10 seconds while requests run; metrics are collected in any case
    disable_log_stats: bool = True
    #: serve Prometheus' metrics on this port of the loopback interface, 0 on any free one; None: nowhere
    metrics_port: int | None = None
    #: where `start_profile` writes; a dict of its fields will do: {"torch_profiler_dir": directory}
    profiler_config: ProfilerConfig = dataclasses.field(default_factory=ProfilerConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "model":
                value = _default(field)
            if value is not None or field.name == "model":
                value = CHECKS[field.name](field.name, value)
            object.__setattr__(self, field.name, value)
        if self.override_pooler_config is not None:
            if self.pooler_config is not None:
                raise ValidationError("pooler_config and override_pooler_config are two names of one thing; set one.")
            object.__setattr__(self, "pooler_config", self.override_pooler_config)
            object.__setattr__(self, "override_pooler_config", None)
        if (
            self.max_num_batched_tokens is not None
            and self.max_num_seqs is not None
            and self.max_num_batched_tokens < self.max_num_seqs
        ):
            raise ValidationError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or equal to "
                f"max_num_seqs ({self.max_num_seqs}): a step gives every running request at least one token."
            )

    def given(self) -> dict[str, Any]:
        """Arguments for an engine's constructor: those that are not None, which stands for the default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every argument to a parser, as vLLM's scripts do; ``LLM(**vars(parser.parse_args()))`` takes them."""
        from jaxllm.config.command_line import add_engine_arguments

        parser.add_argument("--model", help="a named model, a local directory, a .gguf file, or a hub id")
        add_engine_arguments(parser, defaults=True)
        return parser

    @classmethod
    def from_cli_args(cls, arguments: argparse.Namespace) -> EngineArgs:
        """The arguments that a parser with `add_cli_args` has read."""
        given = {name: value for name, value in vars(arguments).items() if name in known_names() | argument_names()}
        return engine_args(given.pop("model"), **given)


def argument_names() -> set[str]:
    """The arguments that the engine acts on."""
    return {field.name for field in dataclasses.fields(EngineArgs)}


def engine_args(model: str | os.PathLike[str], **arguments: Any) -> EngineArgs:
    """`EngineArgs` from vLLM's arguments. Those that have no effect here are named in one line of the log.

    Raises:
        TypeError: an argument that does not exist.
        ValidationError: a value that cannot be used, or an argument of a capability that jaxllm does not have yet.
    """
    fields = argument_names()
    known = fields | known_names()
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name.replace("-", "_").lower(), sorted(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}.{hint}")
    for name, new in ALIASES.items():
        value = arguments.pop(name, None)
        if value is not None and arguments.setdefault(new, value) != value:
            raise ValidationError(f"{name} and {new} are two names of one thing; set one.")
    refuse(arguments)
    given = attention_backend_of(arguments)
    result = EngineArgs(model=model, **{name: value for name, value in given.items() if name in fields})
    report_without_effect(given)
    return result


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
