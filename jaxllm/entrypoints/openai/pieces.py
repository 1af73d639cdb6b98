"""What the engine returned becomes the pieces of OpenAI's streamed answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.entrypoints.openai.logprobs import chat_logprobs
from jaxllm.entrypoints.openai.messages import Dialect, MessageStream
from jaxllm.entrypoints.openai.requests import CHAT, Call
from jaxllm.entrypoints.openai.responses import added, completion_choice, head, usage


@dataclasses.dataclass
class _Choice:
    """What was told of one choice."""

    messages: MessageStream
    begun: bool = False
    #: characters of the tokens so far
    length: int = 0
    #: tokens so far, where some may be reasoning
    token_ids: list[int] = dataclasses.field(default_factory=list)
    #: of them; None: it has not ended
    reasoning: int | None = None

    def reasoning_tokens(self, dialect: Dialect, prompt: str | None, done: bool) -> int:
        """How many tokens so far are reasoning: all of them before there is an answer."""
        message = self.messages.message
        if self.reasoning is None and (done or message.content or message.calls):
            self.reasoning = dialect.reasoning_tokens(self.token_ids, prompt) or 0
        return len(self.token_ids) if self.reasoning is None else self.reasoning


class AnswerPieces:
    """Makes the pieces of one answer.

    Args:
        call: its params have ``output_kind=DELTA``.
    """

    def __init__(self, call: Call):
        self._call = call
        self._head = {**head(call), "object": "chat.completion.chunk" if call.url == CHAT else "text_completion"}
        self._n = call.params.n if call.params else 1
        self._choices: dict[int, _Choice] = {}
        #: of each prompt: its tokens, and those of them that were cached
        self._prompts: dict[int, tuple[int, int]] = {}
        #: outputs that wait for their prompt's log-probabilities, and those
        self._waiting: dict[int, list[RequestOutput]] = {}
        self._prompt_logprobs: dict[int, Any] = {}
        self._generated = 0
        #: of each choice: its tokens that are reasoning
        self._reasoning: dict[int, int] = {}

    def take(self, position: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Make the pieces of what is new.

        Args:
            position: of the output's prompt among the call's.
        """
        self._prompts[position] = len(output.prompt_token_ids), output.num_cached_tokens
        if self._call.params is not None and self._call.params.prompt_logprobs is not None:
            for one in self._with_prompt(position, output):
                yield from self._take(position, one)
        else:
            yield from self._take(position, output)

    def _with_prompt(self, position: int, output: RequestOutput) -> list[RequestOutput]:
        """Give outputs the prompt's log-probabilities, which a prompt's first sequence alone brings, once: the others
        wait for them.
        """
        waiting = self._waiting.setdefault(position, [])
        waiting.append(output)
        known = self._prompt_logprobs.get(position) or output.prompt_logprobs
        if not known:
            return []
        self._prompt_logprobs[position] = known
        self._waiting[position] = []
        return [dataclasses.replace(one, prompt_logprobs=known) for one in waiting]

    def _take(self, position: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for completion in output.outputs:
            if not self._call.echo_only:
                self._generated += len(completion.token_ids)
            index = position * self._n + completion.index
            state = self._choices.get(index)
            if state is None:
                state = self._choices[index] = _Choice(MessageStream(self._call.dialect, output.prompt))
            make = self._chat if self._call.url == CHAT else self._completion
            reasons = self._call.dialect.reasoning is not None
            if reasons:
                state.token_ids += completion.token_ids
            told = dataclasses.replace(output, prompt_logprobs=None) if state.begun else output
            for choice in make(state, told, completion):
                if reasons:
                    done = completion.finish_reason is not None
                    self._reasoning[index] = state.reasoning_tokens(self._call.dialect, output.prompt, done)
                yield self._piece({**choice, "index": index}, output, first=not state.begun)
                state.begun = True

    def last(self) -> dict[str, Any] | None:
        """The piece behind the answer; None: there is none."""
        return {**self._head, "choices": [], "usage": self._usage()} if self._call.include_usage else None

    def _piece(self, choice: dict[str, Any], output: RequestOutput, *, first: bool) -> dict[str, Any]:
        piece = {**self._head, "choices": [choice]}
        if first and self._call.return_token_ids and self._call.url == CHAT:
            piece["prompt_token_ids"] = output.prompt_token_ids
        if self._call.usage_in_all:
            piece["usage"] = self._usage()
        return piece

    def _usage(self) -> dict[str, Any]:
        return usage(
            prompt=sum(length for length, _ in self._prompts.values()),
            completion=self._generated,
            cached=sum(cached for _, cached in self._prompts.values()),
            reasoning=added(self._reasoning.values()),
        )

    def _chat(self, state: _Choice, output: RequestOutput, completion: CompletionOutput) -> Iterator[dict[str, Any]]:
        call = self._call
        if not state.begun:
            yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        done = completion.finish_reason is not None
        logprobs = None
        if call.top_logprobs is not None and completion.token_ids:
            logprobs = chat_logprobs(
                completion.token_ids, completion.logprobs or (), call.top_logprobs, as_ids=call.tokens_as_ids
            )
        deltas = state.messages.push(completion.text, done)
        if not deltas and (done or logprobs or call.return_token_ids):
            deltas = [{}]
        for number, delta in enumerate(deltas):
            # tokens belong to the first of the pieces that they make, and the end to the last one
            choice: dict[str, Any] = {"delta": delta, "logprobs": None if number else logprobs, "finish_reason": None}
            if call.return_token_ids and not number:
                choice["token_ids"] = list(completion.token_ids)
            if done and number + 1 == len(deltas):
                reason = call.dialect.finish_reason(completion.finish_reason, state.messages.message)
                choice |= {"finish_reason": reason, "stop_reason": completion.stop_reason}
            yield choice

    def _completion(
        self, state: _Choice, output: RequestOutput, completion: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        call = self._call
        if state.begun:
            call = dataclasses.replace(call, echo=False)
        if not (completion.text or completion.token_ids or completion.finish_reason or not state.begun):
            return
        choice = completion_choice(call, output, completion, state.length)
        if choice["logprobs"] is not None:
            state.length += sum(map(len, choice["logprobs"]["tokens"]))
        yield choice
