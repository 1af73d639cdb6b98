"""`AsyncLLM`: the engine for asyncio programs."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.method_arguments import with_params
from jaxllm.api.outputs import RequestOutput, was_refused
from jaxllm.api.pooling_outputs import PoolingOutput, PoolingRequestOutput
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.api.tracebacks import ShortTracebacks, short_tracebacks
from jaxllm.config.engine_args import EngineArgs, refuse_stat_loggers, refuse_to_set
from jaxllm.engine.io.call_prompts import chat_prompt
from jaxllm.engine.io.prompts import Prompt, TokenizationOptions, holds_media
from jaxllm.engine.observe.notebook import shown
from jaxllm.engine.thread import EngineThread
from jaxllm.llm import LLM, start_engine
from jaxllm.tokenization.chat import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.metric import Metric
    from jaxllm.config.vllm_config import ModelConfig, VllmConfig
    from jaxllm.tuning.advice.advice import AdviceList

Result = TypeVar("Result")


@short_tracebacks
class AsyncLLM:
    """An engine that a thread of its own drives, so that the event loop never waits for a step.

    Any number of coroutines may generate at the same time; their requests share the engine's batches. Outputs come as
    ``sampling_params.output_kind`` says: all text so far (the default), or only what is new.

    The constructor blocks until the engine has started; `start` does not. The arguments are `LLM`'s.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any):
        llm = LLM.__new__(LLM)
        llm.engine = start_engine(model, kwargs, in_time=True)
        self._drive(llm)

    def _drive(self, llm: LLM) -> None:
        #: the engine's other methods; those that run requests share the engine with this object's
        self.llm = llm
        #: what both are faces of
        self.engine = self.llm.engine
        self._thread = EngineThread(self.engine.client)
        # The thread ends before the engine is freed, and before the interpreter ends, which would end it wherever it
        # is, and in the middle of XLA's code the whole process with it.
        atexit.register(self._thread.close)
        self._end = weakref.finalize(self, _end, self._thread)
        self._end.atexit = False

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(name, value)
        super().__setattr__(name, value)

    @classmethod
    async def start(cls, model: str | os.PathLike[str], **kwargs: Any) -> AsyncLLM:
        """An engine, started in a thread. When the task is cancelled, which is what Ctrl-C does under ``asyncio.run``,
        the start ends.
        """
        cancelled = threading.Event()

        def begin() -> AsyncLLM:
            llm, self = LLM.__new__(LLM), cls.__new__(cls)
            llm.engine = start_engine(model, kwargs, cancelled=cancelled.is_set, in_time=True)
            self._drive(llm)
            return self

        with ShortTracebacks():
            try:
                return await asyncio.to_thread(begin)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **other: Any) -> AsyncLLM:
        """An engine from arguments that are checked already. What vLLM takes besides is ignored, but for
        `stat_loggers`, which are refused.
        """
        refuse_stat_loggers(other)
        return cls(**engine_args.given())

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig, **other: Any) -> AsyncLLM:
        """An engine from what `EngineArgs.create_engine_config` made, otherwise as `from_engine_args`."""
        return cls.from_engine_args(vllm_config.engine_args, **other)

    async def wait_until_ready(self) -> None:
        """As `LLM.wait_until_ready`."""
        await asyncio.to_thread(self.engine.wait_until_ready)

    def __repr__(self) -> str:
        return self.engine.describe("AsyncLLM")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return shown(self, include, exclude)

    # Requests.

    @with_params("sampling_params", SamplingParams)
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt as they come, the last of them ``finished``. Leaving the loop ends the request.

        Args:
            request_id: for `abort`; None: one is made.

        Raises:
            ValidationError: prompt or parameters are refused, or the id is in use.
            RuntimeError: the engine failed or was shut down.
        """
        engine = self.engine
        engine.check_generates("generate")
        options = TokenizationOptions.of(tokenization_kwargs, max_model_len=engine.core.config.max_model_len)
        params = engine.default_params if sampling_params is None else sampling_params
        return self._run(engine.inputs, prompt, params, request_id, priority, options, lora_request)

    @with_params("pooling_params", PoolingParams)
    def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        pooling_task: str | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """The one output of a prompt that is pooled; the arguments are those of `LLM.encode`, and of `generate`."""
        pooling = self.engine.pooling("encode")
        inputs, params = pooling.inputs, pooling.params(pooling_task, pooling_params)
        options = inputs.options(tokenization_kwargs, [params])
        return self._run(inputs, prompt, params, request_id, priority, options, lora_request)

    async def _run(
        self,
        inputs: Any,
        prompt: Prompt,
        params: Any,
        request_id: str | None,
        priority: int,
        options: TokenizationOptions,
        lora_request: LoRARequest | None,
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a request that `inputs` makes."""
        client, pool = self.engine.client, self.engine.pool
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        with ShortTracebacks():
            reading = pool.submit(inputs.reader.read, [prompt], options, slow=holds_media(prompt))
            (prepared,) = await asyncio.wrap_future(reading)
            if isinstance(prepared, ValidationError):
                raise prepared
            own_id = client.next_id(request_id)

            def receive(output: Any) -> None:
                # a loop that is closed, perhaps by now, has nobody left who waits
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(outputs.put_nowait, output)

            def add() -> None:
                request, text = inputs.request(own_id, prepared, inputs.check(params), priority, lora_request)
                client.add(request, text, receive, request_id)

            try:
                await self._call(add)
                finished = False
                while not finished:
                    output = await outputs.get()
                    finished = output.finished
                    if output.error is not None:
                        raise (ValidationError if was_refused(output) else RuntimeError)(output.error)
                    yield output
            finally:
                self._thread.post_logged(lambda: client.end([own_id]))

    @with_params("sampling_params", SamplingParams)
    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        **chat_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` for a conversation; `chat_options` are those of `LLM.chat`."""
        prompt = chat_prompt(messages, **chat_options)
        return self.generate(prompt, sampling_params, request_id, lora_request=lora_request, priority=priority)

    async def abort(self, request_id: str | list[str]) -> None:
        """End requests: their generators yield what there is, with ``finish_reason="abort"``."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        client = self.engine.client
        await self._call(lambda: client.abort([client.id_of(name) for name in names]))

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """As `LLMEngine.add_lora`."""
        return self.engine.adapters.add(lora_request)

    async def remove_lora(self, lora_id: int) -> bool:
        """As `LLMEngine.remove_lora`."""
        return self.engine.adapters.remove(lora_id)

    async def list_loras(self) -> set[int]:
        """As `LLMEngine.list_loras`."""
        return self.engine.adapters.numbers()

    async def pin_lora(self, lora_id: int) -> bool:
        """As `LLMEngine.pin_lora`."""
        return self.engine.adapters.pin(lora_id)

    # The engine.

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As `LLM.reset_prefix_cache`."""
        return await self._call(
            lambda: self.engine.reset_prefix_cache(
                reset_running_requests=reset_running_requests, reset_connector=reset_connector
            )
        )

    async def reset_mm_cache(self) -> None:
        """As `LLM.reset_mm_cache`."""
        self.engine.reset_mm_cache()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`."""
        await self._call(lambda: self.engine.sleep(level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """As `LLM.wake_up`."""
        return await self._call(lambda: self.engine.wake_up(tags))

    async def is_sleeping(self) -> bool:
        return self.engine.core.is_sleeping

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Stop between two steps until `resume_generation`, so that weights can change (`update_weights`).

        Args:
            mode: what happens to requests: "abort" ends them (``finish_reason="abort"``), "wait" runs them to their
                end first, "keep" lets them go on afterwards. New requests are refused with a RuntimeError meanwhile;
                with "keep" they wait.
            clear_cache: forget the KV cache: cached prefixes, and what requests that are kept have computed, which
                is computed anew. Weights that change do that in any case.

        Raises ValidationError for another mode.
        """
        await self._call(lambda: self.engine.pause_generation(mode, clear_cache))

    async def resume_generation(self) -> None:
        """Go on; does nothing when the engine is not paused."""
        await self._call(self.engine.resume_generation)

    async def update_weights(self, params: Any) -> None:
        """As `LLM.update_weights`. Requests that `pause_generation` keeps are computed anew with the new weights."""
        await self._call(lambda: self.engine.update_weights(params))

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`."""
        return await self._call(lambda: self.engine.call_runner(method, args, kwargs))

    async def is_paused(self) -> bool:
        """Whether no step is run: the engine is paused, or sleeps."""
        core = self.engine.core
        return core.is_paused or core.is_sleeping

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """As `LLM.supported_tasks`."""
        return self.engine.supported_tasks

    async def start_profile(self, prefix: str | None = None) -> Path:
        """As `LLM.start_profile`."""
        return await self._call(lambda: self.engine.watching.start_profile(prefix))

    async def stop_profile(self) -> Path:
        """As `LLM.stop_profile`."""
        return await self._call(lambda: self.engine.watching.stop_profile())

    async def is_tracing_enabled(self) -> bool:
        """False: no traces are sent to anyone. ``engine.llm.trace()`` records one."""
        return False

    async def do_log_stats(self) -> None:
        """Nothing: the line is logged by itself, with ``disable_log_stats=False``."""

    async def get_vllm_config(self) -> VllmConfig:
        """`vllm_config`, by a name that older versions of vLLM have."""
        return self.vllm_config

    async def get_model_config(self) -> ModelConfig:
        """`model_config`, by a name that older versions of vLLM have."""
        return self.model_config

    async def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.get_tokenizer()

    @property
    def vllm_config(self) -> VllmConfig:
        """As `LLMEngine.vllm_config`."""
        return self.engine.vllm_config

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.vllm_config.model_config

    def get_metrics(self) -> list[Metric]:
        """As `LLM.get_metrics`."""
        return self.engine.core.metrics()

    def advise(self, *, itl: float | None = None) -> AdviceList:
        """As `LLM.advise`, of what was counted since the engine's start."""
        from jaxllm.tuning.advice.advise import advise_engine

        return advise_engine(self.engine, itl=itl)

    async def check_health(self) -> None:
        """Raise RuntimeError when the engine has been shut down."""
        self._thread.check_open()

    @property
    def errored(self) -> bool:
        """False: a step that fails ends its requests and leaves the engine usable."""
        return False

    @property
    def is_running(self) -> bool:
        return not self._thread.is_closed

    @property
    def is_stopped(self) -> bool:
        return self._thread.is_closed

    @property
    def dead_error(self) -> BaseException:
        """What calls of an engine that has ended raise."""
        return RuntimeError("the engine has been shut down")

    def shutdown(self) -> None:
        """End every request and free the device; idempotent."""
        self._thread.close()
        self._end()
        self.engine.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    async def _call(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, done by the engine's thread between two steps."""
        return await asyncio.wrap_future(self._thread.post(work))


def _end(thread: EngineThread) -> None:
    atexit.unregister(thread.close)
    thread.close()
