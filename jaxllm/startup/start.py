"""From engine arguments to a running engine, phase by phase."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import extra_arg_defaults, hosts
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.engine_args import EngineArgs
from jaxllm.engine.cache.block_hash import BlockHasher
from jaxllm.engine.core import EngineCore
from jaxllm.engine.engine import Engine
from jaxllm.engine.exit import finished_before_exit
from jaxllm.engine.interrupt import StartInterrupt
from jaxllm.engine.io.agreement import Agreement
from jaxllm.engine.io.input_processor import InputProcessor
from jaxllm.engine.io.pooling_inputs import PoolingInputs
from jaxllm.engine.io.prompt_embeds import EmbedsReader
from jaxllm.engine.io.token_constraints import TokenConstraints
from jaxllm.engine.joint_replicas import JointReplicas
from jaxllm.engine.observe.metrics import EngineMetrics
from jaxllm.engine.observe.stats_log import StatsLog, stats_interval
from jaxllm.engine.replicas import Replicas
from jaxllm.models.pooler import embedding_size
from jaxllm.parallel.processes import differing
from jaxllm.parallel.rules import expert_layers
from jaxllm.runner.build import Built, build_replica, build_runner
from jaxllm.runner.compile import identity as program_identity
from jaxllm.runner.compile.background import Background
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.target import Target, target_here
from jaxllm.runner.compile.workers import Workers
from jaxllm.runner.joint_runner import JointRunner
from jaxllm.runner.memory import freed_memory
from jaxllm.runner.memory.gpu_memory import share_gpu_memory
from jaxllm.runner.null import null_runner, ordinary_tokens
from jaxllm.runner.profile import Profile
from jaxllm.startup.cache_bound import cache_bound, keep_within
from jaxllm.startup.engine_settings import engine_settings
from jaxllm.startup.lora_setup import adapter_store
from jaxllm.startup.model_files import ModelFiles
from jaxllm.startup.setup import compile_cache, read_setup
from jaxllm.startup.start_times import StartTimes
from jaxllm.startup.tokenizer_files import kept_tokenizers, tokenizer_path
from jaxllm.startup.vllm_variables import tell_of_variables
from jaxllm.structured.drafts import HostDraftRule
from jaxllm.tokenization.chat import ChatRenderer
from jaxllm.tokenization.load import check_has_tokenizer, load_engine_tokenizer, load_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats import gguf
from jaxllm.weights.resolve import resolve
from pallas_kernels.cpu_ffi import compiled as cpu_ffi

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.runner.runner import Runner

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


@finished_before_exit()
def start(args: EngineArgs, interrupt: StartInterrupt | None = None, *, in_time: bool = False) -> Engine:
    """Start the engine that `args` describe. Raises what `jaxllm.llm.LLM` does.

    Args:
        interrupt: asked now and then whether the start is to end.
        in_time: requests come whenever they come, which one process alone can serve.
    """
    _tell_of_others()
    tell_of_variables()
    times: dict[str, float] = {}
    clock = time.perf_counter()
    bound = cache_bound()
    log_interval = stats_interval() if args.disable_log_stats is False else None
    path = resolve(args.model, revision=args.revision, token=args.hf_token, load_format=args.load_format)
    setup = read_setup(args, path)
    args, model, pooler, checkpoint = setup.args, setup.model, setup.pooler, setup.checkpoint
    is_null = args.load_format == "null"
    share_gpu_memory(args.gpu_memory_utilization)
    if is_null and args.grid.size > 1:
        raise ValidationError(f'{args.grid} with load_format="null": there is no model to split. Leave it out.')
    # before JAX is asked for devices that would not do
    setup.check_classifier()
    tokenizer_files = _tokenizer_files(args, path)
    setup.check_devices()
    if args.enable_expert_parallel and args.tensor_parallel_size == 1 and not args.steps_together:
        logger.info("enable_expert_parallel=True has no effect: one device has all experts (tensor_parallel_size=1)")
    setup.pipeline(args.pipeline_parallel_size)
    target = target_here("cpu" if is_null else args.device, args.grid, together=args.steps_together)
    if in_time and target.num_processes > 1:
        raise ValidationError(
            f"AsyncLLM with tensor_parallel_size={args.tensor_parallel_size} over {target.num_processes} processes: "
            "they would have to get the same requests between the same steps. Use LLM, with the same calls in each; "
            f"AsyncLLM takes at most the {target.grid.size // target.num_processes} devices of its own process."
        )
    times["resolve model"] = time.perf_counter() - clock
    start_times = StartTimes(compile_cache(), _engine_text(args, path, target))
    progress = StartProgress(
        quiet=is_null, on_terminal=sys.stderr.isatty(), expected=start_times.read(), interrupt=interrupt
    )

    # One thread, the tokenizer first: it takes the interpreter, and whoever opens files or works with numpy beside that
    # waits for it after each operation. Compiling, and loading programs, leave it alone.
    program_identity.sources()
    with contextlib.closing(progress), Workers(1, "load files") as background:
        loading = background.submit(_tokenizer, tokenizer_files, args.tokenizer_mode, whole=in_time or is_null)
        progress.ends_with(loading)
        generation = {**_generation_config(args, checkpoint), **args.override_generation_config}
        default_params = _default_params(generation)
        config = setup.runner_config(target if args.steps_together else target.replica(0), progress=progress)
        config = dataclasses.replace(config, answers_early=True)
        # kernels before weights, which can be read beside XLA's compiler as well
        if target.platform == "cpu" and not is_null:
            progress.ends_with(background.submit(_finish_kernels))

        if args.async_scheduling and not config.scheduler.async_scheduling:
            logger.info(
                "%s on a CPU: one step at a time is under way (async_scheduling=False), since virtual devices that "
                "wait for each other in two programs at once may wait for ever.",
                args.grid if args.steps_together else f"tensor_parallel_size={args.tensor_parallel_size}",
            )

        built = (
            None
            if is_null
            else build_runner(config, checkpoint, setup.draft and setup.draft.checkpoint, times.__setitem__, background)
        )
        replicas: list[Runner] = []
        if built is not None and target.grid.data > 1 and not args.steps_together:
            clock = time.perf_counter()
            for number in range(1, target.grid.data):
                replicas.append(build_replica(dataclasses.replace(config, target=target.replica(number)), built))
            times["replicas"] = time.perf_counter() - clock
        clock = time.perf_counter()
        tokenizer = progress.result(loading)
        times["load tokenizer"] = time.perf_counter() - clock
    keep_within(bound)
    gguf.forget_headers()
    freed_memory.give_back()
    eos_token_ids = _eos_token_ids(checkpoint, generation, tokenizer)
    if built is None:
        runner, plan = null_runner(config, ordinary_tokens(tokenizer, model.vocab_size, eos_token_ids))
        built = Built(runner=runner, scheduler=config.scheduler, cache=config.cache_config(plan.num_blocks), plan=plan)
    plan, cache = built.plan, built.cache
    for line in plan.vllm_lines():
        logger.info(line)
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in times.items())
    logger.info("init engine took %.1f s (%s)", sum(times.values()), phases)
    if not is_null:
        start_times.keep(sum(times.values()), compiled=progress.compiles)
    runners = [built.runner, *replicas]
    joint = built.runner if isinstance(built.runner, JointRunner) else None
    launching = runners if joint is None else joint.replicas
    cache_info = {
        "block_size": cache.block_size,
        "num_gpu_blocks": cache.num_blocks,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enable_prefix_caching": cache.enable_prefix_caching,
    }
    constraints = [None] * len(launching)
    adapters = adapter_store(config)
    if pooler is None:
        constraints = _token_constraints(
            args, tokenizer, model.vocab_size, eos_token_ids, len(launching), lockstep=built.scheduler.lockstep
        )
    media = None if setup.media is None else setup.media.reader(plan.max_model_len, tokenizer)
    cores = [
        EngineCore(
            built.scheduler,
            cache,
            runner,
            tokenizer,
            EngineMetrics(
                str(args.model),
                max_model_len=plan.max_model_len,
                engine=number,
                cache_info=cache_info,
                expert_layers=expert_layers(model),
                num_drafts=built.scheduler.num_drafts,
                # all replicas share it: the first counts for all
                processor_cache=None if media is None or number else media.cache,
            ),
            constraints[number],
            pools=pooler is not None,
            bucket=runner.bucket,
            adapters=adapters,
        )
        for number, runner in enumerate(launching)
    ]
    core = cores[0] if len(cores) == 1 else Replicas(cores) if joint is None else JointReplicas(cores, joint.launch)
    if log_interval is not None:
        prefix_caching = cache.enable_prefix_caching
        core.observe(StatsLog(core.stats, log_interval, prefix_caching=prefix_caching, cache_name=plan.cache_name))
    inputs = InputProcessor(
        tokenizer,
        ChatRenderer(tokenizer, args.chat_template),
        vocab_size=model.vocab_size,
        eos_token_ids=eos_token_ids,
        max_logprobs=args.max_logprobs,
        extra_args=frozenset(extra_arg_defaults(args.logits_processors)),
        on_host=hosts(args.logits_processors),
        seed=args.seed,
        constraints=constraints[0],
        hasher=BlockHasher(cache.block_size) if cache.enable_prefix_caching else None,
        media=media,
        adapters=adapters,
        embeds=EmbedsReader(model.hidden_size, jnp.dtype(config.dtype)) if args.enable_prompt_embeds else None,
    )
    pooling_inputs = None
    if pooler is not None:
        pooling_inputs = PoolingInputs(
            inputs.reader,
            tokenizer,
            pooler,
            model=str(args.model),
            hidden_size=embedding_size(model, pooler),
            max_model_len=plan.max_model_len,
            adapters=adapters,
            lower_case=setup.pooling is not None and setup.pooling.do_lower_case,
        )
    engine = Engine(
        args,
        core,
        inputs,
        pooling_inputs,
        runners=runners,
        default_params=default_params,
        profile=Profile,
        settings=engine_settings(args, config, built.scheduler, plan, num_devices=jax.device_count()),
        memory_plan=plan,
        startup_times=times,
        adapters=adapters,
        model_files=ModelFiles(checkpoint, config, setup.other_files),
        agreement=Agreement(differing) if target.num_processes > 1 else None,
        # last: where the start fails, nothing more is compiled
        background=Background(built.unfinished) if built.unfinished is not None else None,
    )
    try:
        for host in hosts(args.logits_processors):
            host.start(engine.vllm_config)
    except BaseException:
        engine.shutdown()
        raise
    return engine


def _tell_of_others() -> None:
    """Say which engines take memory that this one may miss."""
    if not Engine.running():
        return
    gc.collect()  # what only waits for the collector is not alive
    if running := Engine.running():
        size = sum(engine.num_bytes for engine in running) / 1e6
        logger.info(
            "This process has %s that hold%s %.0f MB (%s). To end one: llm.shutdown(), or `del llm` before the next "
            "`llm = LLM(...)`.",
            "an engine" if len(running) == 1 else f"{len(running)} engines",
            "s" if len(running) == 1 else "",
            size,
            ", ".join(str(engine.args.model) for engine in running),
        )


def _engine_text(args: EngineArgs, path: Path, target: Target) -> str:
    """What decides how long a start takes."""
    given = {name: value for name, value in args.given().items() if name != "hf_token"}
    return f"{path} {given} {target.kind}"


def _token_constraints(
    args: EngineArgs,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    count: int,
    *,
    lockstep: bool,
) -> list[TokenConstraints]:
    """Of so many replicas, which share compiled grammars."""
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
    return [
        TokenConstraints(
            compiler,
            tokenizer,
            obstacle=obstacle,
            vocab_size=vocab_size,
            config=config,
            reasoning=dataclasses.replace(reasoning, reasoning_parser=parser),
            lockstep=lockstep,
            draft_rule=HostDraftRule.of(args.speculative_config),
        )
        for _ in range(count)
    ]


def _tokenizer_files(args: EngineArgs, model: Path) -> Path | None:
    """Where the tokenizer is; None where there is to be none. Raises WeightsError for a directory that has none."""
    if args.skip_tokenizer_init:
        return None
    path = tokenizer_path(args, model)
    check_has_tokenizer(path)
    return path


def _tokenizer(path: Path | None, mode: str, *, whole: bool) -> PreTrainedTokenizerBase | None:
    """`whole`: a server's first conversation does not wait for what that needs."""
    if path is None:
        return None
    # as the engine takes it, which asks for no more than an `EngineTokenizer` has
    found: Any = load_tokenizer(path, mode) if whole else load_engine_tokenizer(path, mode, kept=kept_tokenizers())
    return found


def _finish_kernels() -> None:
    cpu_ffi.finish()
    freed_memory.give_back_code()


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
