"""`LLM`: the engine as a library."""

from __future__ import annotations

import collections
import json
import numbers
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm import checks
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.engine.core import EngineCore
from jaxllm.engine.input_processor import InputProcessor, Prompt
from jaxllm.engine.interrupt import DeferredInterrupt
from jaxllm.engine.progress import Progress
from jaxllm.errors import ValidationError
from jaxllm.log import show_log
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.startup import start
from jaxllm.tokenization.chat import ChatRenderer, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.engine.metrics import Metric
    from jaxllm.runner.memory import MemoryPlan


class LLM:
    """A model and the engine that runs it, with vLLM's interface.

    Usable as a context manager; `shutdown` (or dropping the last reference) frees everything that it holds on the
    device.

    Args:
        model: a named model (``smollm2-135m-instruct``), a local directory, a ``.gguf`` file, or a hub id.
        **kwargs: vLLM's engine arguments; see `jaxllm.config.engine_args`.

    Raises:
        TypeError: an argument does not exist.
        ValidationError: an argument's value cannot be honoured, or the model does not fit into memory; the text says
            what would.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any):
        show_log()
        args: EngineArgs = engine_args(model, **kwargs)
        try:
            started = start(args)
        except BaseException as error:
            # whoever keeps the exception (a notebook does) would keep the arrays in its frames
            traceback.clear_frames(error.__traceback__)
            raise
        self._core: EngineCore | None = started.core
        self._free = weakref.finalize(self, started.core.shutdown)
        # at the interpreter's end everything goes anyway, and half of what shutdown needs is gone already
        self._free.atexit = False
        self._inputs: InputProcessor = started.inputs
        self._tokenizer = started.tokenizer
        self._renderer = ChatRenderer(started.tokenizer, args.chat_template)
        self._default_params: SamplingParams = started.default_params
        self._checkpoint = started.checkpoint
        self._runner = started.runner
        #: what the device's memory holds, in bytes; prints as a table
        self.memory_plan: MemoryPlan = started.memory_plan
        #: seconds of each start-up phase
        self.startup_times: dict[str, float] = started.times
        self._num_requests = 0
        #: who takes the outputs of each unfinished request
        self._receivers: dict[str, Callable[[RequestOutput], object]] = {}
        #: one thread at a time drives the engine; the others wait
        self._lock = threading.RLock()

    # Generation.

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the prompts' order. Calls from several threads run one after another.

        Args:
            prompts: text, token ids, a mapping (``prompt`` or ``prompt_token_ids``, ``cache_salt``), or many of them.
            sampling_params: one for all, or one each; None: the model's own defaults.
            priority: smaller runs first, with ``scheduling_policy="priority"``.
            lora_request, tokenization_kwargs, mm_processor_kwargs: vLLM's; not supported yet.
            on_error: "raise" refuses the whole call when one prompt is refused; "return" gives that prompt an output
                with ``finish_reason="error"`` and its reason in ``error``, and runs the others.

        Raises:
            ValidationError: a prompt or its parameters are refused; nothing of the call has run then.
        """
        _refuse(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        return self._run(_as_prompts(prompts), None, sampling_params, priority, use_tqdm, on_error)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Answer one conversation, or many: lists of messages with ``role`` and ``content`` (text, or parts of text).

        The arguments are those of `generate`, and of the chat template (``tools``, ``chat_template_kwargs``, ...).
        """
        _refuse(lora_request=lora_request)

        def render(conversation: Conversation) -> str:
            return self._renderer.render(
                conversation,
                template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )

        return self._run(_as_conversations(messages), render, sampling_params, priority, use_tqdm, on_error)

    def stream_chat(
        self, messages: Conversation, sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """The answer to one conversation, piece by piece as it is generated. Closing the iterator ends the request."""
        params = (sampling_params or self._default_params).clone()
        params.output_kind = RequestOutputKind.DELTA
        prompt = self._renderer.render(messages, add_generation_prompt=True)
        core = self._engine()
        pieces: collections.deque[str] = collections.deque()
        with self._lock:
            request, text = self._inputs.request(self._next_id(), prompt, params, special_tokens=False)
            core.add_request(request, text)
            self._receivers[request.request_id] = lambda output: pieces.append(output.outputs[0].text)
        try:
            while pieces or not request.is_finished:
                if not pieces:
                    with self._lock:
                        # another thread's call may have driven the request while this one waited
                        self._deliver(core.step() if not (pieces or request.is_finished) else ())
                elif piece := pieces.popleft():
                    yield piece
            if request.finish_reason not in ("stop", "length"):
                raise RuntimeError("the answer is cut short: the engine failed in another call, or was shut down")
        finally:
            self._end(core, [request.request_id])

    def _run(
        self,
        prompts: Sequence[Any],
        render: Callable[[Any], str] | None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        use_tqdm: bool,
        on_error: str,
    ) -> list[RequestOutput]:
        """Run prompts to their end; `render` makes prompts of what is none yet (conversations)."""
        if on_error not in ("raise", "return"):
            raise ValidationError(f'on_error must be "raise" or "return", got {on_error!r}')
        params = _one_each("params", self._default_params if sampling_params is None else sampling_params, len(prompts))
        priorities = _one_each("priority", 0 if priority is None else priority, len(prompts))
        done: dict[str, RequestOutput] = {}
        with self._lock:
            core = self._engine()
            ids = [self._next_id() for _ in prompts]
            try:
                with DeferredInterrupt() as interrupt:
                    for request_id, prompt, p, rank in zip(ids, prompts, params, priorities, strict=True):
                        self._add(request_id, prompt, render, p, rank, on_error, done)
                        interrupt.check()
                    with Progress(len(ids), len(done), enabled=use_tqdm) as progress:

                        def receive(output: RequestOutput) -> None:
                            done[output.request_id] = output
                            progress.finished(output)

                        self._receivers.update(dict.fromkeys(ids, receive))
                        while len(done) < len(ids):
                            self._deliver(core.step())
                            interrupt.check()
            finally:
                self._end(core, ids)
        return [done[request_id] for request_id in ids]

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand each output to the call that waits for it: a stream may be open while `generate` drives the engine."""
        for output in outputs:
            self._receivers[output.request_id](output)

    def _end(self, core: EngineCore, request_ids: list[str]) -> None:
        """Leave nothing of these requests behind, finished or not."""
        with self._lock:
            core.abort(request_ids)
            for request_id in request_ids:
                self._receivers.pop(request_id, None)
            self._deliver(core.drain())

    def _add(self, request_id, prompt, render, params, priority, on_error, done) -> None:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        try:
            params = params.clone()
            params.output_kind = RequestOutputKind.FINAL_ONLY
            request, text = self._inputs.request(
                request_id,
                prompt if render is None else render(prompt),
                params,
                priority=checks.integer("priority", priority),
                # a chat template writes them itself
                special_tokens=render is None,
            )
            self._engine().add_request(request, text)
        except ValidationError as error:
            if on_error == "raise":
                raise
            done[request_id] = _refused(request_id, prompt, str(error))

    def _next_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    # What the engine tells.

    def get_metrics(self) -> list[Metric]:
        """A snapshot of all counters, gauges and histograms, by vLLM's names."""
        return self._engine().metrics()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValidationError("the engine has no tokenizer (skip_tokenizer_init=True)")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling_params uses: the model's generation_config.json, else vLLM's defaults."""
        return self._default_params.clone()

    # The engine's life.

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns False, and does nothing, while requests run."""
        with self._lock:
            return self._engine().reset_prefix_cache()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Save weights (orbax), config and tokenizer; ``LLM(directory)`` loads them without converting anything."""
        from jaxllm.weights import orbax

        params = self._runner.params
        if params is None:
            raise RuntimeError("the engine has been shut down; make a new LLM")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        orbax.save(folder, params)
        (folder / "config.json").write_text(json.dumps(self._checkpoint.config, indent=2))
        if self._checkpoint.generation_config:
            (folder / "generation_config.json").write_text(json.dumps(self._checkpoint.generation_config, indent=2))
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(str(folder))

    def shutdown(self) -> None:
        """Free everything on the device; the engine cannot be used afterwards. Idempotent."""
        with self._lock:
            self._core = None
            self._free()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _engine(self) -> EngineCore:
        if self._core is None:
            raise RuntimeError("the engine has been shut down; make a new LLM")
        return self._core


def _refuse(**arguments: Any) -> None:
    """Refuse what later capabilities will take."""
    for name, value in arguments.items():
        if value:
            raise ValidationError(f"{name} is not supported yet")


def _as_prompts(prompts: Prompt | Iterable[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValidationError(
            f"prompts must be text, token ids, a mapping, or a list of these; got {prompts!r:.80} of type "
            f"{type(prompts).__name__}"
        )
    listed = list(prompts)
    if listed and all(isinstance(item, numbers.Integral) for item in listed):
        return [listed]  # pyright: ignore[reportReturnType]
    return listed  # pyright: ignore[reportReturnType]


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    conversations = list(messages) if isinstance(messages, Iterable) else [messages]
    if conversations and isinstance(conversations[0], Mapping):
        conversations = [conversations]
    for conversation in conversations:
        listed = isinstance(conversation, (list, tuple))
        wrong = [m for m in conversation if not _is_message(m)] if listed else [conversation]
        if wrong:
            raise ValidationError(
                "messages must be a list of mappings with 'role' and 'content', or a list of such lists; "
                f"got {wrong[0]!r:.80}"
            )
    return conversations  # pyright: ignore[reportReturnType]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValidationError(f"The lengths of prompts ({count}) and {name} ({len(value)}) must be the same.")
    return list(value)


def _refused(request_id: str, prompt: Prompt, reason: str) -> RequestOutput:
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(
        request_id=request_id, prompt=text, prompt_token_ids=[], outputs=[completion], finished=True, error=reason
    )
