"""Text from prompts and conversations: as a list, as they finish, or piece by piece."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from typing import Any

from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.io.feed import Feed
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.observe.progress import Progress
from jaxllm.methods.base import EngineMethods, refuse
from jaxllm.methods.prompts import as_conversations, as_prompts
from jaxllm.methods.streaming import stream_text
from jaxllm.tokenization.chat import Conversation

logger = logging.getLogger("jaxllm")

_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens or 0

OnOutput = Callable[[RequestOutput], object]


class GenerationMethods(EngineMethods):
    """generate, chat, and their streams."""

    _told_of_default = False

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the prompts' order.

        Calls from several threads share the engine's batches.

        Args:
            prompts: text, token ids, a mapping (``prompt``, ``prompt_token_ids`` or ``messages``, and ``cache_salt``),
                or any iterable of them. What has no length is read by a thread of its own, as the engine has room: it
                may be endless, and it may be slow.
            sampling_params: one for all, or one each; None: the model's own defaults.
            use_tqdm: False shows no progress bar; a callable makes the bar, with tqdm's arguments.
            priority: smaller runs first, with ``scheduling_policy="priority"``.
            tokenization_kwargs: ``add_special_tokens``, ``truncate_prompt_tokens`` and ``truncation_side``.
            lora_request, mm_processor_kwargs: vLLM's; not supported yet.
            on_error: "raise" ends the whole call when one prompt is refused, before anything has run if it is among
                the first 256 (or twice ``max_num_seqs``); "return" gives that prompt an output with
                ``finish_reason="error"`` and its reason in ``error``, and runs the others.
            on_output: takes each output when it is finished. Nothing is kept then, and the list is empty.

        Raises:
            ValidationError: a prompt or its parameters are refused.
        """
        self._require_generation("generate")
        refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        return self._run(
            as_prompts(prompts), sampling_params, use_tqdm, on_output, priority=priority, on_error=on_error,
            tokenization_kwargs=tokenization_kwargs,
        )  # fmt: skip

    def chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Iterable[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        *,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many: lists of messages with ``role`` and ``content`` (text, or parts of text).

        The arguments are those of `generate`, and of the chat template (``tools``, ``chat_template_kwargs``, ...),
        which writes the special tokens: the tokenizer adds none.
        """
        self._require_generation("chat")
        refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        convert = functools.partial(
            chat_prompt,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._run(
            as_conversations(messages), sampling_params, use_tqdm, on_output, priority=priority, on_error=on_error,
            tokenization_kwargs=tokenization_kwargs, convert=convert,
        )  # fmt: skip

    def as_completed(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts, and yield each output when it is finished; `RequestOutput.index` says whose it is.

        The arguments are those of `generate`. The engine works while the next output is asked for. Closing the
        iterator ends what still runs.
        """
        self._require_generation("as_completed")
        listed = as_prompts(prompts)
        feed = self._feed(
            listed, sampling_params, priority=priority, on_error=on_error, tokenization_kwargs=tokenization_kwargs,
            check_first=False,
        )  # fmt: skip
        return self._outputs(feed, listed, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[str, None, None]:
        """The completion of one prompt, piece by piece as it is generated. Closing the iterator ends the request."""
        self._require_generation("stream")
        params = self._default_params if sampling_params is None else sampling_params
        return stream_text(self._client, self._inputs, prompt, params)

    def stream_chat(
        self, messages: Conversation, sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> Generator[str, None, None]:
        """The answer to one conversation, piece by piece; `chat_options` are those of `chat`."""
        return self.stream(chat_prompt(messages, **chat_options), sampling_params)

    def _run(
        self,
        prompts: Iterable[Any],
        params: SamplingParams | Iterable[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
        on_output: OnOutput | None,
        **options: Any,
    ) -> list[RequestOutput]:
        outputs = self._outputs(self._feed(prompts, params, **options), prompts, use_tqdm)
        if on_output is None:
            return sorted(outputs, key=lambda output: output.index)
        for output in outputs:
            on_output(output)
        return []

    def _outputs(
        self, feed: Feed, prompts: Iterable[Any], use_tqdm: bool | Callable[..., Any]
    ) -> Generator[RequestOutput, None, None]:
        total = len(prompts) if isinstance(prompts, Sized) else None
        cut_at_default = True
        with (
            Progress(total, enabled=use_tqdm, stats=self._client.core.stats) as progress,
            contextlib.closing(feed.outputs(progress)) as outputs,
        ):
            for output in outputs:
                cut_at_default = cut_at_default and _cut_at_default(output)
                yield output
        if feed.num_read and cut_at_default and not self._told_of_default:
            self._told_of_default = True
            logger.info(
                "Every output was cut at %d tokens, the default of max_tokens; SamplingParams(max_tokens=...) asks "
                "for longer ones.",
                _DEFAULT_MAX_TOKENS,
            )


def _cut_at_default(output: RequestOutput) -> bool:
    return all(
        completion.finish_reason == "length" and len(completion.token_ids) == _DEFAULT_MAX_TOKENS
        for completion in output.outputs
    )


def chat_prompt(messages: Any, **options: Any) -> Prompt:
    """A conversation as a prompt; `options` are those of `GenerationMethods.chat`."""
    return {"messages": messages, **options}
