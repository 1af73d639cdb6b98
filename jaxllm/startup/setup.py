"""What an engine will be, from its arguments and the model's files, before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import Pooler, PoolerConfig
from jaxllm.config.argument_checks import FIT_TO_MEMORY
from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.cache_folder import cache_folder
from jaxllm.config.cross_checks import (
    check_deterministic,
    check_host_blocks,
    check_pipeline,
    check_pooling,
    check_whole_prompts,
)
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.lora import LoRAConfig
from jaxllm.config.quantization import KV_CACHE_DTYPES
from jaxllm.config.resolve import default_block_size, scheduler_config
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.matrices import matrices
from jaxllm.models.model import ModelConfig, base_prefix
from jaxllm.models.pooler import pooling_specs
from jaxllm.models.pooling_setup import check_dense_modules, classifier_tokens, make_pooler, runner_type
from jaxllm.models.registry import CLASSIFIER_SUFFIX, model_config, pooling_model_config
from jaxllm.parallel.rules import check_split, check_storage_split, expert_layers, spread_experts
from jaxllm.parallel.stages import Stage, pipeline
from jaxllm.runner.compile.attention_backend import attention_backend
from jaxllm.runner.compile.cpu_kernels import with_cpu_kernels
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.target import Target
from jaxllm.runner.memory.offloaded_weights import with_offloaded_weights
from jaxllm.runner.runner_config import RunnerConfig, model_specs
from jaxllm.sampling.processors import check_processors
from jaxllm.startup.draft_setup import DraftSetup, make_drafter, read_draft
from jaxllm.startup.lora_setup import check_adapters
from jaxllm.startup.media_setup import MediaSetup, check_media, processor_files, read_media
from jaxllm.startup.tokenizer_files import read_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.classifier_rows import ClassifierRows
from jaxllm.weights.quantization.method import HEADS
from jaxllm.weights.sentence_transformers import SentenceTransformersConfig, sentence_transformers_config
from pallas_kernels.storage import is_scaled

logger = logging.getLogger("jaxllm")


def compile_cache() -> Path:
    """Where programs are kept that this version of JAX compiled, and how long starts took."""
    return cache_folder() / "xla" / f"jax-{jax.__version__}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and how it will be run, on whatever devices."""

    #: as the model changes them: no chunks and no prefixes where tokens see the whole prompt
    args: EngineArgs
    checkpoint: Checkpoint
    model: ModelConfig
    #: None: the engine generates
    pooler: Pooler | None
    #: the model's sentence-transformers files
    pooling: SentenceTransformersConfig | None
    #: None: no model drafts
    draft: DraftSetup | None = None
    #: None: the engine sees no pictures
    media: MediaSetup | None = None

    def pipeline(self, count: int) -> tuple[Stage, ...]:
        """The stages of the engine; () where there is but one. Raises ValidationError where it cannot have so many."""
        args = self.args
        if count > 1:
            check_pipeline(count, pools=self.pooler is not None, drafts=args.speculative_config is not None)
        layers: Any = args.pipeline_layer_partition
        return pipeline(self.model.num_layers, count, layers)

    def check_devices(self) -> None:
        """Raises ValidationError where the engine cannot be split over the devices that are asked for."""
        args = self.args
        replicas, count = args.data_parallel_size if args.steps_together else 1, args.tensor_parallel_size
        if replicas > 1 and self.pooler is not None:
            raise ValidationError(
                f"enable_expert_parallel=True with data_parallel_size={replicas} is only available for models that "
                "generate. Leave enable_expert_parallel out: each replica has all experts then."
            )
        check_split(self.model, count, replicas=replicas)
        if self.draft is not None:
            try:
                check_split(self.draft.model, count)
            except ValidationError as error:
                raise ValidationError(f"{self.draft.checkpoint.path}, which drafts: {error}") from None
        if replicas * count > 1 and args.deterministic:
            asked = f"{args.grid} and enable_expert_parallel=True" if replicas > 1 else f"tensor_parallel_size={count}"
            raise ValidationError(
                f"deterministic=True with {asked}: sums over devices are not added up in a fixed order. Set "
                f"tensor_parallel_size=1{' and enable_expert_parallel=False' if replicas > 1 else ''}."
            )

    @property
    def other_files(self) -> tuple[str, ...]:
        """Files beside the weights and their config that say how the model is used, relative to its directory."""
        pooling = () if self.pooling is None else self.pooling.files
        return (*pooling, *processor_files(self.checkpoint)) if self.media is not None else pooling

    def _encoder_patches(self, max_model_len: int) -> int:
        """Of the largest picture in so long a context."""
        if self.media is None:
            return 0
        return self.media.any_processor.patches_of(self.media.most_tokens(max_model_len))

    def check_classifier(self) -> None:
        """Raises ValidationError where classes are asked for and the weights cannot tell any."""
        if self.pooler is None or not self.pooler.num_labels:
            return
        head = pooling_specs(self.model, self.pooler).head
        specs: Any = head.classifier  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        name = specs.parts[0].name
        if self.checkpoint.has(name, prefix=base_prefix(self.model)):
            return
        architecture = next(iter(self.checkpoint.config.get("architectures") or ()), "the model")
        raise ValidationError(
            f'convert="classify" needs a classifier, and {architecture} has none: its weights have no {name!r}. '
            'For vectors, LLM(..., convert="embed"); for text, leave convert out; for classes, take a model whose '
            f"architecture ends in {CLASSIFIER_SUFFIX}."
        )

    def _kv_dtype(self, dtype: str) -> str:
        """numpy's name of what keys and values are stored as, in an engine of this dtype."""
        asked = self.args.kv_cache_dtype
        wanted, said = self.checkpoint.kv_cache
        if asked == "auto" and said is None:
            return dtype
        if asked == "auto" and wanted is None:
            logger.warning("The checkpoint says %s, which jaxllm does not have: its KV cache is %s.", said, dtype)
            return dtype
        stored = KV_CACHE_DTYPES[str(wanted) if asked == "auto" else asked]
        if said is not None and is_scaled(jnp.dtype(stored)):
            logger.info(
                "The checkpoint says %s: the KV cache is %s, with a scale of its own for each key and value of a head "
                "(or each latent). kv_cache_dtype=%r leaves them as they are.",
                said,
                stored,
                dtype,
            )
        return stored

    @property
    def _num_logprobs(self) -> int:
        """Most alternatives of a token that a request may ask for."""
        return self.model.vocab_size if self.args.max_logprobs == -1 else self.args.max_logprobs

    def limits(self, target: Target) -> SchedulerConfig:
        """The limits of a step on such devices. Raises ValidationError where they contradict the model."""
        return scheduler_config(
            self.args,
            max_model_len=_max_model_len(self.args, self.model, self.pooling),
            platform=target.platform,
            num_logprobs=self._num_logprobs,
            device_memory_bytes=target.total_bytes,
            device_kind=target.kind,
        )

    def dtype(self, target: Target) -> str:
        """numpy's name of what the model computes in on such devices."""
        return _dtype(self.args.dtype, self.checkpoint.dtype, target.platform, pools=self.pooler is not None)

    def runner_config(self, target: Target, *, progress: StartProgress | None) -> RunnerConfig:
        """What the runner is built from on the devices of `target`: those of one replica, or of all, if they step
        together.

        Args:
            progress: told how far the start is.

        Raises:
            ValidationError: the arguments contradict each other or the model, or the model cannot be split so.
        """
        args, model = self.args, self.model
        self.check_devices()
        check_adapters(args, model, target)
        num_logprobs, limits = self._num_logprobs, self.limits(target)
        if target.platform == "cpu" and target.replicas * target.num_devices > 1:
            limits = dataclasses.replace(limits, async_scheduling=False)
        stages = self.pipeline(target.grid.stage)
        limits = dataclasses.replace(limits, num_micro_batches=len(stages) or 1)
        limits = dataclasses.replace(limits, lockstep=target.num_processes > 1)
        limits = limits if self.media is None else self.media.with_limits(limits)
        check_processors(args.logits_processors, vocab_size=model.vocab_size, max_model_len=limits.max_model_len)
        if args.deterministic:
            check_deterministic(target.platform, pools=self.pooler is not None, latents=model.kv_specs[0].parts == 1)
        dtype = self.dtype(target)
        block_size = args.block_size or default_block_size(target.platform)
        kv_dtype = self._kv_dtype(dtype)
        backend = attention_backend(args.attention_backend, target.device, model, dtype, block_size, kv_dtype)
        if backend.implementation != "xla" and not backend.supports(jnp.dtype(kv_dtype)):
            logger.warning(
                "kv_cache_dtype='fp8_e4m3' has no kernels on %s, and attention is computed by XLA; "
                "kv_cache_dtype='int8' takes as much memory and has them.",
                target.kind,
            )
        config = RunnerConfig(
            model=model,
            quantization=self.checkpoint.quantization,
            pooler=self.pooler,
            groups=kv_cache_groups(model.kv_specs),
            scheduler=limits,
            dtype=dtype,
            kv_dtype=kv_dtype,
            target=target,
            data_parallel_size=args.data_parallel_size,
            pipeline=stages,
            attention=dataclasses.replace(backend, deterministic=args.deterministic),
            block_size=block_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            num_gpu_blocks_override=args.num_gpu_blocks_override,
            enable_prefix_caching=args.enable_prefix_caching,
            prompt_embeds=args.enable_prompt_embeds,
            encoder_patches=self._encoder_patches(limits.max_model_len),
            pixel_normal=((), ()) if self.media is None else self.media.any_processor.normal,
            expert_load=args.record_expert_load,
            enforce_eager=args.enforce_eager,
            fit_max_model_len=args.max_model_len == FIT_TO_MEMORY,
            num_logprobs=num_logprobs,
            logprobs_mode=args.logprobs_mode,
            processors=args.logits_processors,
            drafter=make_drafter(args.speculative_config, model, self.draft, limits.max_model_len),
            draft_quantization=self.draft and self.draft.checkpoint.quantization,
            lora=LoRAConfig.of(args, dtype, target.platform),
            seed=args.seed,
            # one process must not wait, in a compiler that they share, for another one that has found its program
            compile_cache=None if limits.lockstep else compile_cache(),
            progress=progress,
        )
        check_storage_split(config.specs(), target.mesh_sizes)
        if args.cpu_offload_gb:
            config = with_offloaded_weights(config, args.cpu_offload_gb)
        config = with_cpu_kernels(config, cache_folder() / "kernels")
        check_host_blocks(args, num_processes=target.num_processes)
        if not args.kv_offloading_size:
            return config
        return config.with_host_cache(int(args.kv_offloading_size * 2**30) // args.data_parallel_size)


def read_setup(args: EngineArgs, path: Path) -> Setup:
    """The setup of the model at `path`, a directory or a .gguf file.

    Raises:
        ValidationError: the arguments contradict each other or the model.
        WeightsError: the model's config cannot be read.
    """
    checkpoint = Checkpoint(path, args.load_format, args.hf_overrides, config_format=args.config_format)
    pooling = sentence_transformers_config(path)
    runner_kind, convert = runner_type(args, checkpoint.config, has_pooling_files=pooling is not None)
    pooler = None
    if runner_kind == "pooling":
        model, args, pooler = _for_pooling(args, checkpoint.config, pooling, convert)
        if pooler.num_labels:
            checkpoint.classifier = _classifier(args, checkpoint)
        checkpoint.dense_modules = tuple(module.path for module in pooler.dense_modules)
    else:
        model = model_config(checkpoint.config, _asked_length(args))
    media = None
    if isinstance(model, DecoderConfig) and model.vision is not None:
        media = read_media(args, checkpoint, model)
        if media is None:
            model = dataclasses.replace(model, vision=None, sees_whole_pictures=False)
        else:
            check_media(args)
    if args.enable_expert_parallel:
        model = spread_experts(model)
    if args.record_expert_load and not expert_layers(model):
        raise ValidationError("record_expert_load=True, and the model has no experts. Leave it out.")
    specs = model_specs(model, pooler)
    checkpoint.quantize(args.quantization, matrices(specs), prefix=base_prefix(model), sees=media is not None)
    if pooler is None and isinstance(model, DecoderConfig) and model.tie_word_embeddings:
        _tell_of_head(checkpoint)
    draft = None
    if args.speculative_config is not None and args.speculative_config.has_layers:
        assert isinstance(model, DecoderConfig)
        draft = read_draft(args, args.speculative_config, model, max_model_len=_asked_length(args))
    return Setup(
        args=args, checkpoint=checkpoint, model=model, pooler=pooler, pooling=pooling, draft=draft, media=media
    )


def _tell_of_head(checkpoint: Checkpoint) -> None:
    """Warn where a checkpoint has quantized a head of a model that, by its config, takes its embedding for one."""
    found = checkpoint.quantization.matrices if checkpoint.quantization is not None else {}
    if head := next((name for name in found if name.startswith(HEADS)), None):
        logger.warning(
            "The checkpoint has %s quantized, and it is not read: by config.json the model's head is its embedding "
            "(tie_word_embeddings). hf_overrides={'tie_word_embeddings': False} takes it.",
            head,
        )


def _for_pooling(
    args: EngineArgs,
    hf: dict[str, Any],
    files: SentenceTransformersConfig | None,
    convert: str,
) -> tuple[ModelConfig, EngineArgs, Pooler]:
    """The model, the arguments and the pooler of a pooling engine."""
    check_pooling(args)
    model = pooling_model_config(hf, _asked_length(args))
    if isinstance(model, DecoderConfig) and hf.get("is_causal") is False:
        model = dataclasses.replace(model, causal=False)
    if not model.causal:
        check_whole_prompts(args)
        if args.kv_offloading_size:
            raise ValidationError(
                f"kv_offloading_size={args.kv_offloading_size:g} keeps blocks that leave the prefix cache, and a model "
                "that sees whole prompts has none. Leave it out."
            )
        logger.info("Every token sees the whole prompt: prompts are not chunked, and prefixes not cached")
        args = dataclasses.replace(args, enable_chunked_prefill=False, enable_prefix_caching=False)
    pooler = make_pooler(
        args.pooler_config or PoolerConfig(),
        hf,
        convert=convert,
        pooling_type=files.pooling_type if files else None,
        normalize=files.normalize if files else None,
        dense_modules=files.dense_modules if files else (),
    )
    check_dense_modules(model, pooler)
    if model.classifier is not None:
        names = model.classifier
        pooler = dataclasses.replace(pooler, dense_activation=names.activation, norm_eps=model.norm_eps)
    logger.info("Pooling: %s", pooler)
    return model, args, pooler


def _classifier(args: EngineArgs, checkpoint: Checkpoint) -> ClassifierRows | None:
    """What the classification head is made of, where it is not in the weights."""
    made = classifier_tokens(checkpoint.config)
    if made is None:
        return None
    tokens, difference = made
    tokenizer = read_tokenizer(args, checkpoint.path)
    known = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in known]:
        raise ValidationError(f"classifier_from_token: the tokenizer has no token {missing[0]!r}.")
    return ClassifierRows(token_ids=tuple(known[token] for token in tokens), difference=difference)


def _dtype(asked: str, stored: str, platform: str, *, pools: bool) -> str:
    if asked != "auto":
        return asked
    stored = stored.removeprefix("torch.")
    # embeddings are compared with others' to many digits, and such models are small; torch's own default is float32
    if pools and platform == "cpu" and stored in ("", "float32"):
        return "float32"
    # float16 has no fast products on XLA:CPU
    chosen = "float16" if stored == "float16" and platform != "cpu" else "bfloat16"
    if stored and stored != chosen:
        logger.info("The checkpoint is %s and runs in %s; pass dtype=%r to keep it", stored, chosen, stored)
    return chosen


def _max_model_len(args: EngineArgs, model: ModelConfig, pooling: SentenceTransformersConfig | None) -> int:
    longest = model.max_position_embeddings
    asked = _asked_length(args)
    if asked is None:
        usual = model.default_length if isinstance(model, DecoderConfig) else None
        trained = pooling.max_seq_length if pooling is not None else None
        return min(trained or usual or longest, longest)
    if asked > longest:
        raise ValidationError(
            f"User-specified max_model_len ({args.max_model_len}) is greater than the derived max_model_len "
            f"(max_position_embeddings={longest}). Set max_model_len <= {longest}."
        )
    return asked


def _asked_length(args: EngineArgs) -> int | None:
    """`max_model_len` where it is a number of tokens."""
    return None if args.max_model_len == FIT_TO_MEMORY else args.max_model_len
