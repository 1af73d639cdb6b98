"""The engine: one object, over which `LLM`, `AsyncLLM`, `LLMEngine` and the commands are faces."""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.config.vllm_config import VllmConfig, vllm_config
from jaxllm.engine.client import EngineClient
from jaxllm.engine.generation import Generation
from jaxllm.engine.io.feeds import Feeds
from jaxllm.engine.observe.watching import Watching
from jaxllm.engine.pooling import Pooling
from jaxllm.engine.stepped import SteppedRequests
from jaxllm.tokenization.engine_tokenizer import EngineTokenizer
from jaxllm.tokenization.pool import TokenizerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.engine.adapters import AdapterStore
    from jaxllm.engine.core import EngineCore
    from jaxllm.engine.io.agreement import Agreement
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.pooling_inputs import PoolingInputs
    from jaxllm.engine.observe.engine_settings import EngineSettings
    from jaxllm.engine.replicas import Replicas
    from jaxllm.runner.compile.background import Background
    from jaxllm.runner.memory.plan import MemoryPlan
    from jaxllm.runner.null import NullRunner
    from jaxllm.runner.runner import Runner
    from jaxllm.startup.model_files import ModelFiles

Result = TypeVar("Result")

_TAGS = ("weights", "kv_cache", "scheduling")


class Engine:
    """A running engine: what drives it, what makes its requests, and its state as it is seen and changed from outside.

    Dropping the last reference frees everything that it holds on the device, as `shutdown` does. So what it is made of
    holds no reference to it.

    Args:
        args: what it was started with.
        core: or several of them, see `Replicas`.
        inputs: makes requests that continue prompts.
        pooling_inputs: makes requests that pool them; None: the engine generates.
        runners: of each replica.
        profile: begins a profile in a folder, see `Watching`.
        memory_plan: what the device's memory holds, in bytes.
        startup_times: seconds of each start-up phase.
        model_files: what the model was read from.
        agreement: with the other processes that run it; None: there are none.
        adapters: those that requests may have; None: there are none.
        background: makes programs that steps do without until then; None: all are there.
    """

    #: those that are not shut down; whoever starts another one is told
    _running: ClassVar[weakref.WeakSet[Engine]] = weakref.WeakSet()

    def __init__(
        self,
        args: EngineArgs,
        core: EngineCore | Replicas,
        inputs: InputProcessor,
        pooling_inputs: PoolingInputs | None,
        *,
        runners: Sequence[Runner | NullRunner],
        default_params: SamplingParams,
        profile: Callable[[Path], Any],
        settings: EngineSettings,
        memory_plan: MemoryPlan,
        startup_times: dict[str, float],
        model_files: ModelFiles,
        agreement: Agreement | None = None,
        adapters: AdapterStore | None = None,
        background: Background | None = None,
    ):
        args.hold()
        self.args, self.runners, self.model_files = args, tuple(runners), model_files
        self.memory_plan, self.startup_times = memory_plan, startup_times
        self.client = EngineClient(core, agreement)
        self._background = background
        #: None: requests have no adapters
        self.adapters_or_none = adapters
        self.inputs, self.default_params = inputs, default_params
        #: tokenizes beside the engine
        self.pool = TokenizerPool(args.tokenizer_pool_size)
        self.feeds = Feeds(self.client, inputs, self.pool, default_params)
        self.generation = Generation(self.feeds)
        self.stepped = SteppedRequests(self.client, inputs)
        folder = args.profiler_config.torch_profiler_dir
        self.watching = Watching(
            self.client,
            runners[0].bucket,
            profile,
            Path(folder) if folder else cache_folder() / "profiles",
            settings,
        )
        self._pooling = None if pooling_inputs is None else Pooling(self.feeds, pooling_inputs)
        # Steps that other threads run end before the interpreter does, and no more begin: it ends a thread wherever it
        # is, and in the middle of XLA's code the whole process with it.
        at_exit = atexit.register(functools.partial(_end_steps, self.client.lock, core))
        self._free = weakref.finalize(self, _free, core, self.pool, adapters, background, at_exit)
        # at the interpreter's end everything goes anyway, and half of what shutdown needs is gone already
        self._free.atexit = False
        Engine._running.add(self)
        try:
            if args.metrics_port is not None:
                self.watching.serve_metrics(args.metrics_port)
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def running(cls) -> list[Engine]:
        """The engines of this process that have not been shut down."""
        return list(cls._running)

    def describe(self, face: str) -> str:
        """This engine as the text of an object that is a face of it."""
        plan = self.memory_plan
        return (
            f"{face}({str(self.args.model)!r}, device={plan.device!r}, max_model_len={plan.max_model_len}, "
            f"max_num_seqs={plan.max_num_seqs}, max_num_batched_tokens={plan.max_num_batched_tokens}, "
            f"kv_cache={plan.num_blocks} blocks of {plan.block_size} tokens)"
        )

    @property
    def runner(self) -> Runner | NullRunner:
        """Of the first replica, whose weights all have."""
        return self.runners[0]

    @property
    def num_bytes(self) -> int:
        """What weights and states take at present, wherever they are."""
        return sum(runner.num_bytes for runner in self.runners)

    @property
    def core(self) -> EngineCore | Replicas:
        """Raises RuntimeError after `shutdown`."""
        return self.client.core

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Transformers' one, made where it is not there yet; None: the engine was made without one."""
        tokenizer = self.inputs.tokenizer
        return tokenizer.whole if isinstance(tokenizer, EngineTokenizer) else tokenizer

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ValidationError when there is none."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValidationError("the engine has no tokenizer (skip_tokenizer_init=True)")
        return tokenizer

    def wait_until_ready(self) -> None:
        """As `LLM.wait_until_ready`."""
        if self._background is not None:
            self._background.wait()

    def shutdown(self) -> None:
        """Free everything on the device; the engine cannot be used afterwards. Idempotent."""
        with self.client.lock:
            self.watching.close()
            self.client.close()
            self._free()
            Engine._running.discard(self)

    @functools.cached_property
    def vllm_config(self) -> VllmConfig:
        """What it was started with, under vLLM's names."""
        config, plan = self.model_files.config, self.memory_plan
        return vllm_config(
            self.args,
            self.model_files.checkpoint.config,
            scheduler=self.core.config,
            dtype=config.dtype,
            pools=self._pooling is not None,
            block_size=plan.block_size,
            num_blocks=plan.num_blocks,
        )

    # What it can be asked for.

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """The tasks of `LLM.encode` that the model does, and "score"; of a model that generates: "generate"."""
        return ("generate",) if self._pooling is None else self._pooling.tasks

    def check_generates(self, method: str) -> None:
        """Refuse a method of `LLM` that continues prompts on an engine that pools them."""
        if self._pooling is not None:
            raise ValidationError(
                f"LLM.{method}() is only supported for generative models. Try passing `--runner generate` to use the "
                "model as a generative model."
            )

    def pooling(self, method: str) -> Pooling:
        """What pools prompts, for a method of `LLM`. Raises ValidationError on an engine that continues them."""
        if self._pooling is None:
            raise ValidationError(
                f"LLM.{method}() is only supported for pooling models. Try passing `--runner pooling` to use the model "
                'as a pooling model: LLM(..., runner="pooling").'
            )
        return self._pooling

    @property
    def adapters(self) -> AdapterStore:
        """Raises ValidationError where there are none."""
        if self.adapters_or_none is None:
            raise ValidationError("LoRA is not enabled. Pass enable_lora=True when making the LLM (--enable-lora).")
        return self.adapters_or_none

    # Its state, as `LLM`'s methods of these names say.

    def reset_prefix_cache(self, *, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        with self.client.lock:
            if reset_running_requests:
                self.client.preempt_all()
            return self.core.reset_prefix_cache(host_pool=reset_connector)

    def reset_mm_cache(self) -> None:
        media = self.inputs.reader.media
        if media is not None and media.cache is not None:
            media.cache.clear()

    def sleep(self, level: int, mode: str) -> None:
        if isinstance(level, bool) or level not in (0, 1, 2):
            raise ValidationError(f"level must be 0, 1 or 2, got {level!r}.")
        _check_mode(mode)
        if level == 1 and self.core.config.lockstep:
            raise ValidationError(
                "sleep(level=1) keeps the weights in the host's memory, which works on devices of one process. "
                "sleep(level=2) reads them anew."
            )
        with self.client.lock:
            self.client.pause(mode)
            self.core.sleep(level)

    def wake_up(self, tags: Iterable[str] | None) -> bool:
        wanted = set(_TAGS if tags is None else [tags] if isinstance(tags, str) else tags)
        if unknown := wanted.difference(_TAGS):
            raise ValidationError(f"tags must be among {', '.join(_TAGS)}; got {', '.join(map(repr, unknown))}.")
        with self.client.lock:
            return self.core.wake_up(wanted)

    def pause_generation(self, mode: str, clear_cache: bool) -> None:
        _check_mode(mode)
        with self.client.lock:
            self.client.pause(mode, preempt=clear_cache)
            self.core.pause(refuse=mode != "keep")
            if clear_cache:
                self.core.reset_prefix_cache()

    def resume_generation(self) -> None:
        with self.client.lock:
            self.core.resume()

    def release_kv_cache_memory(self) -> None:
        with self.client.lock:
            self.client.pause("abort")
            self.core.sleep(0, kv_cache=True)

    def apply_model(self, function: Callable[[Any], Result]) -> list[Result]:
        checks.function("function", function)
        with self.client.lock:
            self.core.check_awake()
            return [function(runner.model_params) for runner in self.runners]

    def update_weights(self, params: Any) -> None:
        with self.client.lock:
            if self.client.has_unfinished and not (self.core.is_paused or self.core.is_sleeping):
                raise RuntimeError("weights cannot change while requests run: wait for them, or sleep() first")
            # what a pause keeps was computed with the old ones
            self.client.preempt_all()
            if isinstance(params, dict) and self.runner.model_params is not None:
                params = self.model_files.with_tensors(self.runner.model_params, params)
            self.runner.set_params(params)
            others: list[Any] = list(self.runners[1:])
            for runner in others:
                runner.reload_weights()  # from the first
            self._forget_computed()

    def _forget_computed(self) -> None:
        """What was made with weights that are replaced is made anew. No request runs."""
        self.core.reset_prefix_cache(host_pool=True)
        if self.args.lora_embeddings:
            self.core.forget_adapters()

    def call_runner(
        self, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> list[Any]:
        calls: list[Callable[..., Any]]
        if method == "update_config":
            calls = [self.update_config] * len(self.runners)
        elif method == "reload_weights" and (args or kwargs):
            return self._reload_weights(*args, **(kwargs or {}))
        elif isinstance(method, str):
            known = [name for name in dir(type(self.runner)) if not name.startswith("_")]
            if method not in known:
                raise ValidationError(f"the runner has no method {method!r}; it has {', '.join(known)}.")
            calls = [getattr(runner, method) for runner in self.runners]
        else:
            checks.function("method", method)
            calls = [functools.partial(method, runner) for runner in self.runners]
        with self.client.lock:
            if method == "reload_weights":
                # what was computed with the old ones is computed anew
                self.client.preempt_all()
                self._forget_computed()
            self.core.rest()
            return [call(*args, **(kwargs or {})) for call in calls]

    def _reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Any]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> list[Any]:
        """The arguments are those of vLLM's workers."""
        if weights_path is not None or not is_checkpoint_format:
            given = f"weights_path={weights_path!r}, is_checkpoint_format={is_checkpoint_format!r}"
            raise ValidationError(
                "reload_weights takes tensors by Hugging Face's names, weights_iterator=..., or none, and reads anew "
                f"what the engine began with; got {given}. Read the tensors of another path, and give those."
            )
        if weights_iterator is None:
            return self.call_runner("reload_weights", (), None)
        self.update_weights(dict(weights_iterator))
        return [None] * len(self.runners)

    def update_config(self, overrides: Mapping[str, Any]) -> None:
        """What vLLM's workers are told before ``reload_weights``: what weights are read from, and nothing else.

        Raises ValidationError for anything but ``{"load_config": {"load_format": ...}}``.
        """
        load = overrides.get("load_config") if isinstance(overrides, Mapping) and len(overrides) == 1 else None
        if not isinstance(load, Mapping) or set(load) != {"load_format"}:
            raise ValidationError(
                "update_config changes what reload_weights reads, {'load_config': {'load_format': ...}}; got "
                f"{overrides!r:.200}. Anything else is an argument of a new LLM."
            )
        self.model_files.checkpoint.use_format(load["load_format"])

    def save(self, folder: Path, *, format: str) -> None:
        with self.client.lock:
            self.core.check_awake()
            self.model_files.save(folder, self.runner.model_params, self.tokenizer, format=format)


def _check_mode(mode: str) -> None:
    if mode not in ("abort", "wait", "keep"):
        raise ValidationError(f'mode must be "abort", "wait" or "keep", got {mode!r}.')


def _end_steps(lock: Any, core: EngineCore | Replicas) -> None:
    """Let what runs end, and nothing begin."""
    lock.acquire()
    core.rest()


def _free(
    core: EngineCore | Replicas,
    pool: TokenizerPool,
    adapters: AdapterStore | None,
    background: Background | None,
    at_exit: Callable[[], object],
) -> None:
    atexit.unregister(at_exit)
    if background is not None:
        background.stop()
    if adapters is not None:
        adapters.shutdown()
    pool.shutdown()
    core.shutdown()
