"""The engine as the endpoints see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.async_llm import AsyncLLM
from jaxllm.entrypoints.openai.adapters import NamedAdapters
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.parameters import SamplingReader
from jaxllm.entrypoints.openai.reasoning import ReasoningParser
from jaxllm.entrypoints.openai.requests import Call, Translator
from jaxllm.entrypoints.openai.responses import response_body
from jaxllm.entrypoints.openai.tools.parsers import PARSERS
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.load import RETRY_AFTER, Load
from jaxllm.entrypoints.serve.settings import Settings

#: an output, and the position of its prompt among the call's
Placed = tuple[int, Any]
#: prompts of a call that the event loop takes up in one turn
AT_ONCE = 64
#: and that it hands to the engine, where this runs fewer than half of them at once; the others wait for their ends
IN_HAND = 256


class Service:
    """Runs calls on an engine.

    Args:
        engine: whoever made it shuts it down.
    """

    def __init__(self, engine: AsyncLLM, settings: Settings):
        self.engine, self.settings = engine, settings
        #: what is called as if it were a model
        self.adapters = NamedAdapters(engine.engine.adapters_or_none, settings.model_names)
        for name, path in settings.lora_modules:
            self.adapters.load(name, path)
        parser, reasoning = settings.tool_call_parser, settings.reasoning_parser
        self.translator = Translator(
            model_names=settings.model_names,
            sampling=SamplingReader(engine.engine.default_params),
            adapters=self.adapters,
            tools=None if parser is None else PARSERS[parser],
            reasoning=None if reasoning is None else ReasoningParser.of(reasoning, engine.engine.get_tokenizer),
            streams=True,
            trusts_templates=settings.trust_request_chat_template,
            template_files=False,
            template_options=settings.template_options,
        )
        self.load = Load(engine.engine.core.max_num_seqs, settings.max_queue)

    @property
    def classifies(self) -> bool:
        """Whether the engine pools into classes."""
        return "classify" in self.engine.engine.supported_tasks

    async def outputs(self, call: Call, *, task: str | None = None) -> AsyncGenerator[Placed, None]:
        """Outputs of a call's prompts as they come; of a call that is not streamed, one a prompt. Leaving the loop ends
        the requests.

        Args:
            task: of a call that pools, as `AsyncLLM.encode` has it.

        Raises APIError for what the engine refuses, or cannot do.
        """
        sequences = len(call.prompts) * (call.params.n if call.params else 1)
        with self.load.taken(sequences), self.told():
            streams = [self._stream(call, prompt, task) for prompt in call.prompts]
            if len(streams) == 1:
                async with contextlib.aclosing(streams[0]) as stream:
                    async for output in stream:
                        yield 0, output
                return
            most = max(IN_HAND, 2 * self.engine.engine.core.max_num_seqs)
            async with contextlib.aclosing(_merged(streams, most)) as merged:
                async for placed in merged:
                    yield placed

    async def whole(self, call: Call, *, task: str | None = None) -> list[Any]:
        """The last output of each of a call's prompts, in their order. Raises as `outputs`."""
        found: dict[int, Any] = {}
        async with contextlib.aclosing(self.outputs(call, task=task)) as outputs:
            async for position, output in outputs:
                found[position] = output
        return [found[position] for position in range(len(call.prompts))]

    def _stream(self, call: Call, prompt: Any, task: str | None) -> AsyncGenerator[Any, None]:
        if call.params is None:
            own = {"lora_request": call.lora_request, "priority": call.priority}
            return self.engine.encode(prompt, call.pooling, pooling_task=task, **own)
        return self.engine.generate(prompt, call.params, lora_request=call.lora_request, priority=call.priority)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """While it lasts, what the engine raises becomes an APIError."""
        try:
            yield
        except ValidationError as error:
            raise APIError(str(error)) from error
        except RuntimeError as error:
            if not self.engine.is_running:
                raise APIError("The server is ending.", status=503) from error
            core = self.engine.engine.core
            if core.is_sleeping or core.is_paused:
                raise APIError(str(error), status=503, retry_after=RETRY_AFTER) from error
            raise APIError(str(error), status=500) from error


async def whole_answer(call: Call, outputs: list[Any]) -> JSONAnswer:
    """Return the answer to a call; one of many outputs is made beside the event loop. Raises as `response_body`."""
    if len(outputs) <= AT_ONCE:
        return JSONAnswer(response_body(call, outputs))
    return await asyncio.to_thread(lambda: JSONAnswer(response_body(call, outputs)))


async def _merged(streams: list[AsyncGenerator[RequestOutput, None]], most: int) -> AsyncGenerator[Placed, None]:
    """Outputs of several streams as they come, of so many at a time. What one raises ends all. They begin and end a few
    in one turn of the event loop: others have theirs in between.
    """
    room = asyncio.Semaphore(most)
    queue: asyncio.Queue[Callable[[], Placed | None]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def pump(position: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    queue.put_nowait(lambda output=output: (position, output))
        except Exception as error:
            queue.put_nowait(lambda error=error: _raise(error))
        else:
            queue.put_nowait(lambda: None)
            room.release()

    async def begin() -> None:
        for item in enumerate(streams):
            await room.acquire()
            tasks.append(asyncio.create_task(pump(*item)))
            if len(tasks) % AT_ONCE == 0:
                await asyncio.sleep(0)

    beginning = asyncio.create_task(begin())
    try:
        running = len(streams)
        while running:
            placed = (await queue.get())()
            if placed is None:
                running -= 1
            else:
                yield placed
    finally:
        beginning.cancel()
        for first in range(0, len(tasks), AT_ONCE):
            some = tasks[first : first + AT_ONCE]
            for task in some:
                task.cancel()
            await asyncio.gather(*some, return_exceptions=True)


def _raise(error: Exception) -> None:
    raise error
