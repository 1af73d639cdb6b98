"""From engine arguments to a running engine, phase by phase."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxllm.cache_folder import cache_folder
from jaxllm.config.argument_checks import FIT_TO_MEMORY
from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.pooler import Pooler, PoolerConfig
from jaxllm.config.resolve import scheduler_config
from jaxllm.engine.core import EngineCore
from jaxllm.engine.input_processor import InputProcessor
from jaxllm.engine.metrics import EngineMetrics
from jaxllm.engine.pooling_inputs import PoolingInputs
from jaxllm.engine.stats_log import StatsLog, stats_interval
from jaxllm.engine.token_constraints import TokenConstraints
from jaxllm.errors import ValidationError
from jaxllm.logits_processor import extra_arg_defaults
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.model import ModelConfig
from jaxllm.models.pooling_setup import make_pooler, runner_type
from jaxllm.models.registry import model_config, pooling_model_config
from jaxllm.runner.attention_backend import attention_backend
from jaxllm.runner.build import Built, RunnerConfig, build_runner
from jaxllm.runner.gpu_memory import share_gpu_memory
from jaxllm.runner.memory import MemoryPlan, device_memory
from jaxllm.runner.null import NullRunner, null_runner, ordinary_tokens
from jaxllm.runner.pooling_runner import PoolingRunner
from jaxllm.runner.runner import Runner
from jaxllm.sampling.processors import check_processors
from jaxllm.sampling_params import SamplingParams
from jaxllm.tokenization.chat import ChatRenderer
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.resolve import resolve
from jaxllm.weights.sentence_transformers import SentenceTransformersConfig, sentence_transformers_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: fields of generation_config.json that are sampling parameters
_GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclasses.dataclass(kw_only=True)
class Started:
    """A running engine and what its facade needs to know."""

    core: EngineCore
    inputs: InputProcessor
    #: None: the engine generates
    pooling_inputs: PoolingInputs | None
    #: sentence-transformers' files of the model, relative to its directory
    pooling_files: tuple[str, ...]
    runner: Runner | PoolingRunner | NullRunner
    tokenizer: PreTrainedTokenizerBase | None
    checkpoint: Checkpoint
    default_params: SamplingParams
    memory_plan: MemoryPlan
    times: dict[str, float]


def start(args: EngineArgs) -> Started:
    """Start the engine that `args` describe. Raises what `jaxllm.llm.LLM` does."""
    times: dict[str, float] = {}
    clock = time.perf_counter()
    progress = sys.stderr.isatty()
    log_interval = None if args.disable_log_stats else stats_interval()
    path = resolve(args.model, revision=args.revision, token=args.hf_token)
    checkpoint = Checkpoint(path, args.load_format, args.hf_overrides)
    pooling = sentence_transformers_config(path)
    runner_kind, convert = runner_type(args, checkpoint.config, has_pooling_files=pooling is not None)
    is_null = args.load_format == "null"
    pooler = None
    if runner_kind == "pooling":
        if is_null:
            raise ValidationError('load_format="null" generates only; it has no vectors to pool.')
        model, args, pooler = _for_pooling(args, checkpoint.config, pooling, convert)
    else:
        model = model_config(checkpoint.config)
    share_gpu_memory(args.gpu_memory_utilization)
    device = find_device("cpu" if is_null else args.device)
    times["resolve model"], clock = time.perf_counter() - clock, time.perf_counter()

    tokenizer = None
    if not args.skip_tokenizer_init:
        tokenizer = load_tokenizer(_tokenizer_path(args, path))
    times["load tokenizer"] = time.perf_counter() - clock
    generation = {**_generation_config(args, checkpoint), **args.override_generation_config}
    default_params = _default_params(generation)

    groups = kv_cache_groups(model.layer_window)
    num_logprobs = model.vocab_size if args.max_logprobs == -1 else args.max_logprobs
    limits = scheduler_config(
        args,
        max_model_len=_max_model_len(args, model, pooling),
        platform=device.platform,
        num_logprobs=num_logprobs,
        device_memory_bytes=device_memory(device)[0],
    )
    check_processors(args.logits_processors, vocab_size=model.vocab_size, max_model_len=limits.max_model_len)
    dtype = _dtype(args.dtype, checkpoint.dtype, device.platform, pools=pooler is not None)
    config = RunnerConfig(
        model=model,
        pooler=pooler,
        groups=groups,
        scheduler=limits,
        dtype=dtype,
        device=device,
        attention=attention_backend(args.attention_backend, device, model, dtype, args.block_size),
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        num_gpu_blocks_override=args.num_gpu_blocks_override,
        enable_prefix_caching=args.enable_prefix_caching,
        enforce_eager=args.enforce_eager,
        fit_max_model_len=args.max_model_len == FIT_TO_MEMORY,
        num_logprobs=num_logprobs,
        logprobs_mode=args.logprobs_mode,
        processors=args.logits_processors,
        seed=args.seed,
        compile_cache=cache_folder() / "xla" / f"jax-{jax.__version__}",
        progress=progress,
    )
    eos_token_ids = _eos_token_ids(checkpoint, generation, tokenizer)
    if is_null:
        runner, plan = null_runner(config, ordinary_tokens(tokenizer, model.vocab_size, eos_token_ids))
        built = Built(runner=runner, scheduler=limits, cache=config.cache_config(plan.num_blocks), plan=plan)
    else:
        built = build_runner(config, checkpoint, times.__setitem__)
    plan, cache = built.plan, built.cache
    for line in plan.vllm_lines():
        logger.info(line)
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in times.items())
    logger.info("init engine took %.1f s (%s)", sum(times.values()), phases)
    metrics = EngineMetrics(
        str(args.model),
        max_model_len=plan.max_model_len,
        cache_info={
            "block_size": cache.block_size,
            "num_gpu_blocks": cache.num_blocks,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "enable_prefix_caching": cache.enable_prefix_caching,
        },
    )
    eos_token_ids = _eos_token_ids(checkpoint, generation, tokenizer)
    constraints = None
    if pooler is None:
        constraints = _token_constraints(args, tokenizer, model.vocab_size, eos_token_ids)
    core = EngineCore(built.scheduler, cache, built.runner, tokenizer, metrics, constraints, pools=pooler is not None)
    if log_interval is not None:
        core.observe(StatsLog(core.stats, log_interval, prefix_caching=cache.enable_prefix_caching))
    inputs = InputProcessor(
        tokenizer,
        ChatRenderer(tokenizer, args.chat_template),
        vocab_size=model.vocab_size,
        eos_token_ids=eos_token_ids,
        max_logprobs=args.max_logprobs,
        extra_args=frozenset(extra_arg_defaults(args.logits_processors)),
        seed=args.seed,
        constraints=constraints,
    )
    pooling_inputs = None
    if pooler is not None:
        pooling_inputs = PoolingInputs(
            inputs.reader,
            tokenizer,
            pooler,
            model=str(args.model),
            hidden_size=model.hidden_size,
            max_model_len=plan.max_model_len,
            lower_case=pooling is not None and pooling.do_lower_case,
        )
    return Started(
        core=core,
        inputs=inputs,
        pooling_inputs=pooling_inputs,
        pooling_files=pooling.files if pooling is not None else (),
        runner=built.runner,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        default_params=default_params,
        memory_plan=plan,
        times=times,
    )


def find_device(name: str) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The first device of a platform: "auto" takes what JAX prefers. Raises ValidationError when there is none."""
    if name == "auto":
        return jax.devices()[0]
    try:
        return jax.devices("cuda" if name in ("cuda", "gpu") else name)[0]
    except RuntimeError as error:
        raise ValidationError(
            f"device={name!r} is not there: {error}. For NVIDIA GPUs install jaxllm[cuda12] or jaxllm[cuda13]."
        ) from error


def _token_constraints(
    args: EngineArgs, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_token_ids: frozenset[int]
) -> TokenConstraints:
    config, reasoning = args.structured_outputs_config, args.reasoning_config
    parser = args.reasoning_parser or reasoning.reasoning_parser or config.reasoning_parser
    compiler, obstacle = None, "Structured outputs requires a tokenizer so it can't be used with 'skip_tokenizer_init'"
    if tokenizer is not None:
        try:
            from jaxllm.structured.compiler import GrammarCompiler
        except ImportError as error:  # where packages cannot be installed, everything else works
            obstacle = f"Structured outputs need llguidance, which cannot be imported ({error}): pip install llguidance"
        else:
            compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids, config=config)
    return TokenConstraints(
        compiler,
        tokenizer,
        obstacle=obstacle,
        vocab_size=vocab_size,
        config=config,
        reasoning=dataclasses.replace(reasoning, reasoning_parser=parser),
    )


def _tokenizer_path(args: EngineArgs, model: Path) -> Path:
    if args.tokenizer is None and args.tokenizer_revision is None:
        return model
    return resolve(args.tokenizer or args.model, revision=args.tokenizer_revision, token=args.hf_token)


def _for_pooling(
    args: EngineArgs,
    hf: dict[str, Any],
    files: SentenceTransformersConfig | None,
    convert: str,
) -> tuple[ModelConfig, EngineArgs, Pooler]:
    """The model, the arguments and the pooler of a pooling engine."""
    if args.logits_processors:
        raise ValidationError("logits_processors change what is sampled, and a pooling engine samples nothing.")
    model = pooling_model_config(hf)
    if isinstance(model, DecoderConfig) and hf.get("is_causal") is False:
        model = dataclasses.replace(model, causal=False)
    if not model.causal:
        longest = args.max_model_len or 0
        if args.max_num_batched_tokens is not None and longest > args.max_num_batched_tokens:
            raise ValidationError(
                f"max_num_batched_tokens ({args.max_num_batched_tokens}) is smaller than max_model_len ({longest}), "
                "and a model that sees whole prompts computes each in one step. Set max_num_batched_tokens to at least "
                f"{longest}, or max_model_len to at most {args.max_num_batched_tokens}."
            )
        logger.info("Every token sees the whole prompt: prompts are not chunked, and prefixes not cached")
        args = dataclasses.replace(args, enable_chunked_prefill=False, enable_prefix_caching=False)
    pooler = make_pooler(
        args.pooler_config or PoolerConfig(),
        hf,
        convert=convert,
        pooling_type=files.pooling_type if files else None,
        normalize=files.normalize if files else None,
    )
    logger.info("Pooling: %s", pooler)
    return model, args, pooler


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
    if args.max_model_len is None or args.max_model_len == FIT_TO_MEMORY:
        trained = pooling.max_seq_length if pooling is not None else None
        return min(trained or longest, longest)
    if args.max_model_len > longest:
        raise ValidationError(
            f"User-specified max_model_len ({args.max_model_len}) is greater than the derived max_model_len "
            f"(max_position_embeddings={longest}). Set max_model_len <= {longest}."
        )
    return args.max_model_len


def _generation_config(args: EngineArgs, checkpoint: Checkpoint) -> dict[str, Any]:
    if args.generation_config == "vllm":
        return {}
    if args.generation_config == "auto":
        return checkpoint.generation_config
    return Checkpoint.read_generation_config(args.generation_config)


def _default_params(generation: dict[str, Any]) -> SamplingParams:
    given = {
        ours: generation[theirs] for theirs, ours in _GENERATION_FIELDS.items() if generation.get(theirs) is not None
    }
    if given:
        logger.info("Default sampling parameters from the model's generation config: %s", given)
    return SamplingParams(**given)


def _eos_token_ids(
    checkpoint: Checkpoint, generation: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Ends of generation that any of the model's files names."""
    found: set[int] = set()
    for value in (
        checkpoint.config.get("eos_token_id"),
        generation.get("eos_token_id"),
        getattr(tokenizer, "eos_token_id", None),
    ):
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)
