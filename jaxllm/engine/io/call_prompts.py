"""One prompt or many: what a call's first argument means."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.engine.io.prompts import Prompt
from jaxllm.tokenization.chat import Conversation

#: of a column of questions
_CONVERSATIONS = "[[{{'role': 'user', 'content': text}}] for text in {column}]"


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> Iterable[Prompt]:
    """The prompts of a call: one text, mapping or list of token ids stands for a list of one.

    Iterators are not read beyond their first item. A list, a tuple or an array of integers is one prompt of token ids;
    a column of a table with integers is refused, as it may be one or many.

    Raises:
        ValidationError: something that is no prompt and holds none, or a table.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValidationError(
            f"prompts must be text, token ids, a mapping, or a list of these; got {prompts!r:.80} of type "
            f"{type(prompts).__name__}"
        )
    if isinstance(prompts, Iterator):
        first = list(itertools.islice(prompts, 1))
        if first and isinstance(first[0], numbers.Integral):
            return [[*first, *prompts]]  # pyright: ignore[reportReturnType]
        return itertools.chain(first, prompts)  # pyright: ignore[reportReturnType]
    checks.no_table("prompts", prompts)
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, numbers.Integral) for item in listed):
        if checks.is_column(prompts):
            raise ValidationError(
                f"prompts is a {type(prompts).__name__} of integers. If they are the token ids of one prompt, pass "
                "list(column); if each is a prompt of its own, [str(number) for number in column]."
            )
        return [listed]
    return listed


def as_conversations(messages: Any) -> Iterable[Conversation]:
    """The conversations of a call: one list of messages stands for a list of one. Each is checked when it is rendered.

    Raises:
        ValidationError: something that is neither.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ValidationError(
            "messages must be a list of mappings with 'role' and 'content', or a list of such lists; "
            f"got {messages!r:.80}"
        )
    checks.no_table("messages", messages, give=_CONVERSATIONS)
    if isinstance(messages, Iterator):
        first = list(itertools.islice(messages, 1))
        rest = itertools.chain(first, messages)
        return [list(rest)] if first and isinstance(first[0], Mapping) else rest
    conversations = list(messages)
    return [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations


def chat_prompt(messages: Any, **options: Any) -> Prompt:
    """A conversation as a prompt; `options` are those of `LLM.chat`."""
    return {"messages": messages, **options}


def with_processor_kwargs(prompts: Iterable[Prompt], options: Mapping[str, Any] | None) -> Iterable[Prompt]:
    """The prompts of a call with its `mm_processor_kwargs`, beneath each prompt's own; texts and ids have no images."""
    if not options:
        return prompts
    if not isinstance(options, Mapping):
        raise ValidationError(f"mm_processor_kwargs must be a dict, got {options!r:.80}")

    def one(prompt: Any) -> Any:
        if not isinstance(prompt, Mapping):
            return prompt
        return {**prompt, "mm_processor_kwargs": {**options, **(prompt.get("mm_processor_kwargs") or {})}}

    return list(map(one, prompts)) if isinstance(prompts, list) else map(one, prompts)
