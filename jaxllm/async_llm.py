"""`AsyncLLM`: the engine for asyncio programs."""

from __future__ import annotations

import asyncio
import atexit
import collections
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput, was_refused
from jaxllm.api.pooling_outputs import PoolingOutput, PoolingRequestOutput
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.engine_args import EngineArgs
from jaxllm.engine.io.prompts import Prompt, TokenizationOptions
from jaxllm.llm import LLM
from jaxllm.methods.generation import chat_prompt
from jaxllm.tokenization.chat import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.metric import Metric

logger = logging.getLogger("jaxllm")

Result = TypeVar("Result")


class AsyncLLM:
    """An engine that a thread of its own drives, so that the event loop never waits for a step.

    Any number of coroutines may generate at the same time; their requests share the engine's batches. Outputs come as
    ``sampling_params.output_kind`` says: all text so far (the default), or only what is new.

    The constructor blocks until the engine has started; `start` does not. The arguments are `LLM`'s.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any):
        #: the engine's other methods; those that run requests share the engine with this object's
        self.llm = LLM(model, **kwargs)
        self._work: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._drive, name="jaxllm engine", daemon=True)
        self._thread.start()
        # the interpreter ends a thread wherever it is, and in the middle of XLA's code the whole process with it
        atexit.register(self._end_thread)

    @classmethod
    async def start(cls, model: str | os.PathLike[str], **kwargs: Any) -> AsyncLLM:
        """An engine, started in a thread."""
        return await asyncio.to_thread(lambda: cls(model, **kwargs))

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> AsyncLLM:
        """An engine from arguments that are checked already."""
        return cls(**engine_args.given())

    # Requests.

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
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
        llm = self.llm
        llm._require_generation("generate")
        options = TokenizationOptions.of(
            tokenization_kwargs, max_model_len=llm._client.core.scheduler.config.max_model_len
        )
        params = llm._default_params if sampling_params is None else sampling_params
        return self._run(llm._inputs, prompt, params, request_id, priority, options)

    def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        pooling_task: str | None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """The one output of a prompt that is pooled; the arguments are those of `LLM.encode`, and of `generate`."""
        inputs, params = self.llm._pooling_request("encode", pooling_task, pooling_params)
        options = inputs.options(tokenization_kwargs, [params])
        return self._run(inputs, prompt, params, request_id, priority, options)

    async def _run(
        self,
        inputs: Any,
        prompt: Prompt,
        params: Any,
        request_id: str | None,
        priority: int,
        options: TokenizationOptions,
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a request that `inputs` makes."""
        llm = self.llm
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        (prepared,) = await asyncio.wrap_future(llm._pool.submit(inputs.reader.read, [prompt], options))
        if isinstance(prepared, ValidationError):
            raise prepared
        own_id = llm._client.next_id(request_id)

        def receive(output: Any) -> None:
            # a loop that has been closed has nobody left who waits
            if not loop.is_closed():
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        def add() -> None:
            request, text = inputs.request(own_id, prepared, inputs.check(params), priority)
            llm._client.add(request, text, receive, request_id)

        def end() -> None:
            _logged(lambda: llm._client.end([own_id]))

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
            self._post(end)

    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **chat_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` for a conversation; `chat_options` are those of `LLM.chat`."""
        return self.generate(chat_prompt(messages, **chat_options), sampling_params, request_id, priority=priority)

    async def abort(self, request_id: str | list[str]) -> None:
        """End requests: their generators yield what there is, with ``finish_reason="abort"``."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        client = self.llm._client
        await self._call(lambda: client.abort([client.id_of(name) for name in names]))

    # The engine.

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """As `LLM.reset_prefix_cache`."""
        return await self._call(lambda: self.llm.reset_prefix_cache(reset_running_requests))

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`."""
        await self._call(lambda: self.llm.sleep(level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """As `LLM.wake_up`."""
        return await self._call(lambda: self.llm.wake_up(tags))

    async def is_sleeping(self) -> bool:
        return self.llm.is_sleeping

    async def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.llm.get_tokenizer()

    def get_metrics(self) -> list[Metric]:
        """As `LLM.get_metrics`."""
        return self.llm.get_metrics()

    async def check_health(self) -> None:
        """Raise RuntimeError when the engine has been shut down."""
        if self._closing:
            _refuse()

    @property
    def errored(self) -> bool:
        """False: a step that fails ends its requests and leaves the engine usable."""
        return False

    @property
    def is_running(self) -> bool:
        return not self._closing

    def shutdown(self) -> None:
        """End every request and free the device; idempotent."""
        self._end_thread()
        atexit.unregister(self._end_thread)
        self.llm.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    # The engine's thread.

    def _end_thread(self) -> None:
        """Let the thread finish its step, and do nothing more. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, work: Callable[[], Result]) -> Future[Result]:
        """What `work` returns or raises, done by the engine's thread between two steps."""
        future: Future[Result] = Future()
        with self._wake:
            if self._closing:
                _do(future, _refuse)
            else:
                self._work.append((future, work))
                self._wake.notify()
        return future

    async def _call(self, work: Callable[[], Result]) -> Result:
        """As `_post`, waiting for it."""
        return await asyncio.wrap_future(self._post(work))

    def _drive(self) -> None:
        client = self.llm._client
        while True:
            with self._wake:
                while not (self._closing or self._work or client.can_step):
                    self._wake.wait()
                if self._closing:
                    break
            while self._work:
                _do(*self._work.popleft())
            if client.can_step:
                _logged(client.step)
        # nothing is added any more
        for future, _ in self._work:
            _do(future, _refuse)


def _refuse() -> None:
    raise RuntimeError("the engine has been shut down; make a new AsyncLLM")


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _logged(work: Callable[[], None]) -> None:
    """Do what runs steps of the engine, with nobody there to hear of an error."""
    try:
        work()
    except Exception:
        # whoever waits for a request has been told
        logger.exception("a step of the engine failed; its requests are ended")
