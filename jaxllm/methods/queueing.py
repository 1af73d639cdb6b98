"""Submitting and collecting as two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.io.feed import Feed
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.observe.progress import Progress
from jaxllm.methods.base import EngineMethods, refuse
from jaxllm.methods.generation import chat_prompt
from jaxllm.methods.prompts import as_conversations, as_prompts
from jaxllm.tokenization.chat import Conversation


class QueueingMethods(EngineMethods):
    """enqueue, enqueue_chat, wait_for_completion."""

    #: what was enqueued and not collected, one a call
    _enqueued: list[Feed]

    def enqueue(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        lora_request: None = None,
        priority: int | Iterable[int] | None = None,
        use_tqdm: bool = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """Queue prompts and return their request ids; `wait_for_completion` runs them.

        The arguments are those of `generate`. All prompts are tokenized before this returns, without a progress bar.

        Raises:
            ValidationError: a prompt or its parameters are refused; nothing of the call is queued then.
        """
        self._require_generation("enqueue")
        refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        return self._enqueue(as_prompts(prompts), sampling_params, priority, tokenization_kwargs)

    def enqueue_chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **chat_options: Any,
    ) -> list[str]:
        """`enqueue` for conversations; `chat_options` are the chat template's, as in `chat`."""
        self._require_generation("enqueue_chat")
        refuse(lora_request=lora_request)
        prompts = [chat_prompt(conversation, **chat_options) for conversation in as_conversations(messages)]
        return self._enqueue(prompts, sampling_params, priority, tokenization_kwargs)

    def _enqueue(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None,
        priority: int | Iterable[int] | None,
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[str]:
        listed = list(prompts)
        feed = self._feed(
            listed, params, priority=priority, tokenization_kwargs=tokenization_kwargs, window=max(len(listed), 1)
        )
        try:
            ids = feed.submit()
        except BaseException:
            feed.close()
            raise
        self._enqueued.append(feed)
        return ids

    def wait_for_completion(
        self,
        output_type: type[Any] | tuple[type[Any], ...] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[RequestOutput]:
        """Run what was enqueued to its end; the outputs come in the order of submission.

        Raises:
            TypeError: an output is not of `output_type`.
            RuntimeError: the engine failed, in another call perhaps; nothing of what was enqueued is left then.
        """
        feeds, self._enqueued = self._enqueued, []
        outputs: list[RequestOutput] = []
        try:
            total = sum(feed.num_read for feed in feeds)
            with Progress(total, enabled=use_tqdm, stats=self._client.core.stats) as progress:
                for feed in feeds:
                    outputs += sorted(feed.outputs(progress), key=lambda output: output.index)
        finally:
            for feed in feeds:
                feed.close()
        for output in outputs:
            if output_type is not None and not isinstance(output, output_type):
                raise TypeError(f"request {output.request_id} gave {type(output).__name__}, not {output_type}")
        return outputs
