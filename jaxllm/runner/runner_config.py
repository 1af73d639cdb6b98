"""What a runner is built from."""
# Trees of shapes have the form of `Params` and `State`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import LogitsProcessor
from jaxllm.api.pooler import Pooler
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.lora import LoRAConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.layers.context import Context
from jaxllm.layers.weight import Axis
from jaxllm.models.adapters import Stacks, adapter_specs
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.matrices import quantized
from jaxllm.models.model import ModelConfig
from jaxllm.models.offloaded import offloaded_layers
from jaxllm.models.params import Params
from jaxllm.models.pooler import PoolingModel, pooling_specs
from jaxllm.models.segments import cut, resegment, segment_sizes
from jaxllm.models.specs import decoder_specs
from jaxllm.models.vision import VisionConfig, vision_specs
from jaxllm.parallel.host_memory import with_layers_on_host
from jaxllm.parallel.mesh import TENSOR
from jaxllm.parallel.rules import cache_axes, device_bytes, each_sharding, held, local_model, shapes, split_axes
from jaxllm.parallel.stages import Stage, of_each_array, stage_groups, stage_model, with_ends
from jaxllm.runner.capacities import context_capacity, row_capacity
from jaxllm.runner.compile.block_copies import STAGED_BLOCKS
from jaxllm.runner.compile.encoder import Normalization
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.target import Target
from jaxllm.runner.packing import MediaFields
from jaxllm.speculative.drafter import Drafter, ReadingDrafter
from jaxllm.weights.quantization.detect import Quantization
from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.storage import STORAGE, is_scaled


def model_specs(model: ModelConfig, pooler: Pooler | None) -> Any:
    """What a model's weights are before any is quantized, each run of equal layers in one segment.

    Args:
        pooler: None: the model generates.
    """
    if pooler is not None:
        return pooling_specs(model, pooler)
    assert isinstance(model, DecoderConfig)
    return decoder_specs(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """What a runner is built from. `groups` must be those of `model`."""

    model: ModelConfig
    #: of its matrices; None: they are of the engine's dtype
    quantization: Quantization | None = None
    #: None: the model generates
    pooler: Pooler | None = None
    groups: tuple[KVCacheGroup, ...]
    scheduler: SchedulerConfig
    dtype: str
    #: numpy's name of what keys and values are stored as
    kv_dtype: str
    target: Target
    #: copies of the model, each on devices such as these; or, where these are those of all, on a part of them
    data_parallel_size: int = 1
    #: () where the model is not cut into stages
    pipeline: tuple[Stage, ...] = ()
    #: what `stages` says of one of them; None: this is the whole model
    stage: Stage | None = None
    #: what attention is compiled to; None: the device's fastest
    attention: Backend | None = None
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    enable_prefix_caching: bool
    #: of the host's memory, for each copy of the model: blocks, and their bytes
    num_host_blocks: int = 0
    host_cache_bytes: int = 0
    #: of each device's weights, the most that may lie in the host's memory
    cpu_offload_bytes: int = 0
    #: whether prompts may be vectors
    prompt_embeds: bool = False
    #: patches of the largest picture, 0: there are none; and what the tower takes of pixels
    encoder_patches: int = 0
    pixel_normal: Normalization = ((), ())
    #: whether the tokens of each expert are counted
    expert_load: bool = False
    enforce_eager: bool
    #: steps may run before all programs are there, where others can stand in for those
    answers_early: bool = False
    #: reduce max_model_len to what fits, rather than fail
    fit_max_model_len: bool
    num_logprobs: int
    logprobs_mode: str
    processors: tuple[LogitsProcessor, ...]
    #: room for adapters; None: there are none
    lora: LoRAConfig | None = None
    #: who makes drafts for the model to check; None: nobody
    drafter: Drafter | None = None
    #: of the matrices of the model that does
    draft_quantization: Quantization | None = None
    seed: int
    compile_cache: Path | None
    #: told how far the start is; None: nobody is
    progress: StartProgress | None

    @property
    def stages(self) -> tuple[RunnerConfig, ...]:
        """What each stage of the pipeline is built from; itself where there is none."""
        if not self.pipeline:
            return (self,)
        return tuple(
            dataclasses.replace(
                self,
                model=stage_model(self.model, stage),
                groups=stage_groups(self.groups, stage),
                target=self.target.stage(stage.index),
                pipeline=(),
                stage=stage,
            )
            for stage in self.pipeline
        )

    @property
    def backend(self) -> Backend:
        """What attention is compiled to."""
        backend = self.attention or device_backend(self.device)
        is_float8 = self.kv_dtype.startswith("float8")
        return dataclasses.replace(backend, float8=self.kv_dtype) if is_float8 else backend

    @property
    def context(self) -> Context:
        """How the model's layers are compiled."""
        return Context(backend=self.backend, split=split_axes(self.target.mesh_sizes))

    @property
    def platform(self) -> str:
        return self.target.platform

    @property
    def device(self) -> Any:
        """One of them."""
        return self.target.device

    @property
    def sharding(self) -> Any:
        """Of what every device has whole; of a pipeline, and of weights in the host's memory, of each array."""
        offloaded, own = self.offloaded, None
        if self.pipeline:
            own = of_each_array(self.specs(), self.pipeline, [stage.target.sharding for stage in self.stages])
        elif not offloaded or self.target.sharding is None:
            return self.target.sharding
        if not offloaded:
            return own
        each = each_sharding(self.specs(), self.target.sharding if own is None else own)
        return with_layers_on_host(each, segment_sizes(self.specs()), offloaded)

    @property
    def step_model(self) -> ModelConfig:
        """What one device computes of the model."""
        return local_model(self.model, self.target.num_devices)

    @property
    def draft_model(self) -> DecoderConfig | None:
        """The model that drafts, or the layers of a head that does; None: none does."""
        return self.drafter.model if isinstance(self.drafter, ReadingDrafter) else None

    @property
    def step_drafter(self) -> Drafter | None:
        """What one device computes of the drafts."""
        if not isinstance(self.drafter, ReadingDrafter):
            return self.drafter
        return dataclasses.replace(self.drafter, model=local_model(self.drafter.model, self.target.num_devices))

    @property
    def table_width(self) -> int:
        """Blocks of the longest request that programs have room for."""
        # drafts behind the last position are masked, and have places all the same
        return -(-(self.context_capacity + self.scheduler.num_drafts) // self.block_size)

    @property
    def row_capacity(self) -> int:
        """Rows that programs have room for."""
        return row_capacity(self.scheduler.max_num_seqs, self.platform)

    @property
    def has_four_rows(self) -> bool:
        """Whether steps of up to four tokens have a program: a CPU takes longer for every row by a quantized weight."""
        return self.platform == "cpu" and self.quantization is not None

    @property
    def context_capacity(self) -> int:
        """Tokens of a row that programs have room for."""
        return context_capacity(self.scheduler.max_model_len, self.model.max_position_embeddings, self.platform)

    @property
    def has_explicit_cache(self) -> bool:
        return self.num_gpu_blocks_override is not None or self.kv_cache_memory_bytes is not None

    @property
    def block_bytes(self) -> int:
        """On one device, of all that a block holds: of the layers of a model that drafts, too."""
        own = self._page_bytes(self.page_shape) * self.layers_per_group
        if not isinstance(drafter := self.drafter, ReadingDrafter):
            return own
        draft = self._page_bytes(self.draft_page_shape(drafter.model)) * drafter.model.num_layers
        return own + draft + drafter.kept_numbers * jnp.dtype(self.dtype).itemsize

    def _page_bytes(self, page_shape: tuple[int, ...]) -> int:
        scales = 4 * math.prod(page_shape[:-1]) if is_scaled(self.cache_dtype) else 0
        return math.prod(page_shape) * self.cache_dtype.itemsize + scales

    def draft_page_shape(self, model: DecoderConfig) -> tuple[int, ...]:
        """On one device."""
        return local_model(model, self.target.num_devices).kv_specs[0].page_shape(self.block_size)

    @property
    def layers_per_group(self) -> int:
        return max(len(group.layers) for group in self.groups)

    @property
    def host_block_bytes(self) -> int:
        """Of a block in the host's memory: each device's part of it, of all stages; once what every device has."""
        if self.pipeline:
            return sum(stage.host_block_bytes for stage in self.stages)
        return self.block_bytes * (self.target.num_devices if TENSOR in cache_axes(self.model) else 1)

    @property
    def staged_bytes(self) -> int:
        """Of the blocks that are on their way to the host, and from there, on one device."""
        return STAGED_BLOCKS * self.block_bytes if self.num_host_blocks else 0

    def with_host_cache(self, size: int) -> RunnerConfig:
        """This configuration, with `size` bytes of the host's memory for blocks that leave the prefix cache of each
        copy of the model.

        Raises:
            ValidationError: they hold no block, or the machine does not have them.
        """
        asked, left = size * self.data_parallel_size / 2**30, self.target.host_bytes
        if left is not None and asked * 2**30 > left:
            raise ValidationError(
                f"kv_offloading_size={asked:.3f} GiB does not fit: the machine has {left / 2**30:.3f} GiB of memory "
                f"available. Set it to less than {left / 2**30:.3f}."
            )
        blocks = size // self.host_block_bytes
        if not blocks:
            raise ValidationError(
                f"kv_offloading_size holds no block: it is {size} bytes for each copy of the model, and a block of "
                f"{self.block_size} tokens takes {self.host_block_bytes}. Set it to at least "
                f"'{self.host_block_bytes * self.data_parallel_size}B'."
            )
        return dataclasses.replace(self, num_host_blocks=blocks, host_cache_bytes=blocks * self.host_block_bytes)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of every layer, on one device."""
        return self.block_bytes // self.block_size * len(self.groups)

    @property
    def page_shape(self) -> tuple[int, ...]:
        """On one device."""
        return self.step_model.kv_specs[0].page_shape(self.block_size)

    @property
    def scales_shape(self) -> tuple[int, ...] | None:
        """Of a page's scales, on one device; None: its numbers have none."""
        return self.page_shape[:-1] if is_scaled(self.cache_dtype) else None

    @property
    def cache_dtype(self) -> np.dtype:
        """Of the pages: of the numbers' bits where writing numbers would convert the whole cache."""
        dtype = jnp.dtype(self.kv_dtype)
        as_bits = self.platform == "cpu" or not self.backend.supports(dtype)
        return STORAGE.get(dtype, dtype) if as_bits else dtype

    @property
    def vision(self) -> VisionConfig | None:
        """Of the tower that sees pictures; None: there is none."""
        return self.model.vision if isinstance(self.model, DecoderConfig) else None

    @property
    def media_fields(self) -> MediaFields | None:
        """What steps bring of pictures, to every stage; None: there are none."""
        if not self.encoder_patches or not isinstance(self.model, DecoderConfig):
            return None
        return MediaFields(self.model.rope_sections != (), self.model.sees_whole_pictures)

    @property
    def tower_bytes(self) -> int:
        """Of the tower's weights, which every device has."""
        if self.vision is None:
            return 0
        return device_bytes(vision_specs(self.vision), jnp.dtype(self.dtype), {})

    @property
    def unquantized_specs(self) -> Any:
        """Of the weights, none of them quantized, in the segments that the devices take."""
        specs: Any = model_specs(self.model, self.pooler)
        return resegment(specs, segment_sizes(self.specs()))

    @property
    def head_name(self) -> str:
        """What the head is called in the checkpoint, also where it is the embedding."""
        assert isinstance(self.model, DecoderConfig)
        return self.model.names.head

    def adapter_specs(self, slots: int | None) -> Stacks:
        """Of the stacks of so many adapters; None: of one by itself."""
        assert self.lora is not None
        sizes, rank = self.target.mesh_sizes, self.lora.max_lora_rank

        def own(axis: Axis) -> int:
            return held(axis, sizes).size

        tables = self.dtype if self.lora.has_tables else None
        return adapter_specs(self.unquantized_specs, rank=rank, slots=slots, own=own, tables=tables)

    def adapter_shapes(self) -> Stacks | None:
        """Of the stacks of adapters, with their shardings; None: there are none."""
        if self.lora is None:
            return None
        return shapes(self.adapter_specs(self.lora.max_loras), jnp.dtype(self.lora.dtype), self.target.sharding)

    @property
    def adapter_bytes(self) -> int:
        """Of the stacks on one device, and of an adapter on its way there."""
        if self.lora is None:
            return 0
        specs = self.adapter_specs(self.lora.max_loras + 1)
        return device_bytes(specs, jnp.dtype(self.lora.dtype), self.target.mesh_sizes)

    def specs(self) -> Params | PoolingModel:
        """What the model's weights are, in the segments that its devices take."""
        specs = self._specs_of_runs()
        alone = [bound for layer in self.offloaded for bound in (layer, layer + 1)]
        runs = cut(segment_sizes(specs), [*alone, *(stage.stop for stage in self.pipeline)])
        specs = resegment(specs, self.target.segments(runs))
        if isinstance(self.drafter, ReadingDrafter):
            specs = dataclasses.replace(specs, draft=self._draft_specs(self.drafter))
        return specs if self.stage is None else with_ends(specs, self.stage)

    def _draft_specs(self, drafter: ReadingDrafter) -> Params:
        specs = drafter.specs()
        if self.draft_quantization is not None:
            specs = quantized(specs, self.draft_quantization.layout)
        return resegment(specs, self.target.segments(segment_sizes(specs)))

    def _specs_of_runs(self) -> Any:
        """Of the whole model, each run of equal layers in one segment."""
        specs = model_specs(self.model, self.pooler)
        if self.quantization is None:
            return specs
        return quantized(specs, self.quantization.layout, first_layer=0 if self.stage is None else self.stage.first)

    def params(self) -> Params | PoolingModel:
        """Shapes of the weights, with their shardings."""
        return shapes(self.specs(), jnp.dtype(self.dtype), self.sharding)

    @property
    def weight_bytes(self) -> int:
        """On one device; a part of them where other copies of the model share them."""
        whole = device_bytes(self.specs(), jnp.dtype(self.dtype), self.target.mesh_sizes)
        return -(-whole // self.target.sharers) - self.host_weight_bytes

    @property
    def layer_bytes(self) -> list[int]:
        """Of each layer's weights, on one device."""
        specs = self._specs_of_runs()
        each: Any = resegment(specs, (1,) * sum(segment_sizes(specs)))
        layers = getattr(each, "body", each).layers
        return [device_bytes(layer, jnp.dtype(self.dtype), self.target.mesh_sizes) for layer in layers]

    @property
    def offloaded(self) -> tuple[int, ...]:
        """The layers whose weights lie in the host's memory; of each stage as many as fit there."""
        if not self.cpu_offload_bytes:
            return ()
        if self.pipeline:
            stages = zip(self.pipeline, self.stages, strict=True)
            return tuple(own.first + layer for own, config in stages for layer in config.offloaded)
        return offloaded_layers(self.layer_bytes, self.cpu_offload_bytes)

    @property
    def host_weight_bytes(self) -> int:
        """Of one device's weights, what lies in the host's memory."""
        sizes = self.layer_bytes if self.cpu_offload_bytes else ()
        return sum(sizes[layer] for layer in self.offloaded) // self.target.sharers

    @property
    def fetched_bytes(self) -> int:
        """Of the layers that are copied from the host's memory, what is on a device at once: two of them."""
        sizes = self.layer_bytes if self.cpu_offload_bytes else ()
        return sum(sorted(sizes[layer] for layer in self.offloaded)[-2:])

    def cache_config(self, num_blocks: int) -> CacheConfig:
        return CacheConfig(
            block_size=self.block_size,
            num_blocks=num_blocks,
            groups=self.groups,
            enable_prefix_caching=self.enable_prefix_caching,
            num_host_blocks=self.num_host_blocks,
        )
