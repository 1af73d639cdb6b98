"""A running engine's configuration under vLLM's names: scripts read ``llm.llm_engine.vllm_config``, nothing of jaxllm
does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.config.speculative import SpeculativeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, as the engine runs it."""

    model: str
    tokenizer: str
    revision: str | None
    #: "generate" or "pooling"
    runner_type: str
    #: numpy's name of it; vLLM has torch's type here
    dtype: str
    seed: int
    max_model_len: int
    quantization: str | None
    max_logprobs: int
    enforce_eager: bool
    #: config.json with ``hf_overrides``, as transformers reads it
    hf_config: PretrainedConfig
    #: of checkpoints no code is run
    trust_remote_code: bool = False

    @property
    def served_model_name(self) -> str:
        return self.model

    @property
    def architectures(self) -> list[str]:
        return list(self.hf_config.architectures or ())

    @property
    def hf_text_config(self) -> PretrainedConfig:
        """What of it is about text."""
        return self.hf_config.get_text_config()

    def get_vocab_size(self) -> int:
        return self.hf_text_config.vocab_size

    def get_hidden_size(self) -> int:
        return self.hf_text_config.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache, as the engine has made it."""

    block_size: int
    #: block 0 included, which holds no request's tokens; None: no engine has counted them
    num_gpu_blocks: int | None
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    #: "auto": the model's
    cache_dtype: str = "auto"
    #: GiB
    kv_offloading_size: float | None = None
    cpu_offload_gb: float = 0.0
    kv_offloading_backend: str = "native"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The devices that the engine is split over. There is one process, so every rank is 0."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    data_parallel_rank: int = 0
    rank: int = 0

    @property
    def world_size(self) -> int:
        """Devices of one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """All of it. What is set here changes nothing: an engine runs already, or starts from `engine_args`."""

    model_config: ModelConfig
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    parallel_config: ParallelConfig
    #: what it was made of
    engine_args: EngineArgs = dataclasses.field(repr=False)

    @property
    def speculative_config(self) -> SpeculativeConfig | None:
        return self.engine_args.speculative_config


def vllm_config(
    args: EngineArgs,
    config: Mapping[str, Any],
    *,
    scheduler: SchedulerConfig,
    dtype: str,
    pools: bool,
    block_size: int,
    num_blocks: int | None,
) -> VllmConfig:
    """The configuration of an engine, which may be one that does not run yet.

    Args:
        args: what it is started with.
        config: the model's config.json.
        scheduler: the limits that hold, which the arguments may have left open.
        pools: whether it pools prompts.
    """
    return VllmConfig(
        model_config=ModelConfig(
            model=str(args.model),
            tokenizer=str(args.tokenizer or args.model),
            revision=args.revision,
            runner_type="pooling" if pools else "generate",
            dtype=dtype,
            seed=args.seed,
            max_model_len=scheduler.max_model_len,
            quantization=args.quantization,
            max_logprobs=args.max_logprobs,
            enforce_eager=args.enforce_eager,
            hf_config=_hf_config(config),
        ),
        cache_config=CacheConfig(
            block_size=block_size,
            num_gpu_blocks=num_blocks,
            gpu_memory_utilization=args.gpu_memory_utilization,
            enable_prefix_caching=args.enable_prefix_caching,
            cache_dtype=str(args.kv_cache_dtype),
            kv_offloading_size=args.kv_offloading_size,
            cpu_offload_gb=args.cpu_offload_gb,
            kv_offloading_backend=args.kv_offloading_backend,
        ),
        scheduler_config=scheduler,
        parallel_config=ParallelConfig(
            tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size,
            data_parallel_size=args.data_parallel_size,
        ),
        engine_args=args,
    )


def _hf_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """config.json as transformers' class of the model, with that class's defaults; else as its general one."""
    from transformers import AutoConfig, PretrainedConfig

    values = dict(config)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except (KeyError, TypeError, ValueError):
        return PretrainedConfig.from_dict(dict(config))
