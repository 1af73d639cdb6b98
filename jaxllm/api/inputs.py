"""Prompts that are more than a text: vLLM's mappings, and one for conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class MediaPrompt(TypedDict):
    """What prompts for models that see hold besides text."""

    #: {"image": picture or pictures, "video": frames or several}: `jaxllm.multimodal` says in which forms
    multi_modal_data: NotRequired[dict[str, Any]]
    #: names of their contents, which stand for them: {"image": ["a name", None]}
    multi_modal_uuids: NotRequired[dict[str, Any]]
    #: how they are prepared: {"min_pixels": ..., "max_pixels": ..., "fps": ...}
    mm_processor_kwargs: NotRequired[dict[str, Any]]


class TextPrompt(MediaPrompt):
    """A text."""

    prompt: str
    #: requests with different salts never share cached blocks
    cache_salt: NotRequired[str]


class TokensPrompt(MediaPrompt):
    """Token ids."""

    prompt_token_ids: list[int]
    #: shown in the output; not tokenized
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


class EmbedsPrompt(TypedDict):
    """Vectors in place of tokens, for an engine with `enable_prompt_embeds=True`."""

    #: [tokens, hidden size] of floats: an array of numpy, JAX or torch, or lists
    prompt_embeds: Any
    #: shown in the output; not tokenized
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


class ChatPrompt(MediaPrompt):
    """A conversation, rendered by the model's chat template where prompts are tokenized."""

    messages: list[dict[str, Any]]
    tools: NotRequired[list[dict[str, Any]]]
    chat_template: NotRequired[str]
    chat_template_kwargs: NotRequired[dict[str, Any]]
    chat_template_content_format: NotRequired[str]
    add_generation_prompt: NotRequired[bool]
    continue_final_message: NotRequired[bool]
    cache_salt: NotRequired[str]


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt | EmbedsPrompt | ChatPrompt | Mapping[str, Any]
