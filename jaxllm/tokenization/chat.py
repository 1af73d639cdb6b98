"""Conversations become prompts by the model's chat template."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.tokenization.mistral import MistralChat

logger = logging.getLogger("jaxllm")

Message = Mapping[str, Any]
Conversation = Sequence[Message]

CONTENT_FORMATS = ("auto", "string", "openai")
_NO_TEMPLATE = "chat_template is not supported for Mistral tokenizers: mistral_common writes conversations itself."
#: parts of messages that stand for something else, which the engine has taken out (`jaxllm.multimodal`)
PICTURES = ({"type": "image"}, {"type": "video"})
#: roles that OpenAI's API has
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ALWAYS_KNOWN = ("user", "assistant")


def load_chat_template(chat_template: str | os.PathLike[str] | None) -> str | None:
    """Return the text of a Jinja template given as itself or as a file.

    Raises ValidationError for what looks like a path and is none: it would silently be every prompt's text.
    """
    if not isinstance(chat_template, str | os.PathLike | None):
        raise ValidationError(f"chat_template must be a Jinja template or its file, got {chat_template!r:.80}.")
    template = None if chat_template is None else os.fspath(chat_template)
    if template is None or "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text()
    raise ValidationError(
        f"The chat template {template!r} is neither an existing file nor a Jinja template (it holds no '{{')."
    )


class ChatRenderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: None when the engine was built without one; then nothing can be rendered.
        template: a Jinja template, or its file, in place of the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, template: str | None):
        self._tokenizer = tokenizer
        self._template = load_chat_template(template)
        #: what Mistral's own tokenizers have in a template's place
        self._mistral: MistralChat | None = getattr(tokenizer, "mistral_chat", None)
        if self._mistral is not None and template is not None:
            raise ValidationError(_NO_TEMPLATE)
        #: roles that were warned of
        self._told: set[str] = set()
        self._told_of_tools = False

    def render(
        self, conversation: Conversation, *, template: str | None = None, content_format: str = "auto", **kwargs: Any
    ) -> str | list[int]:
        """Return the prompt's text, special tokens included; or, of Mistral's own tokenizers, its token ids.

        Args:
            content_format: what the template expects as a message's content: "string" (and "auto"), or "openai", a
                list of parts.

        Raises:
            ValidationError: no template, a message that is none, or one that the template refuses.
        """
        if content_format not in CONTENT_FORMATS:
            raise ValidationError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}; got {content_format!r}."
            )
        if self._tokenizer is None:
            raise ValidationError("chat needs a tokenizer, and skip_tokenizer_init=True: use generate()")
        if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
            raise ValidationError(
                "messages must be a list of mappings with 'role' and 'content', or a list of such lists; "
                f"got {conversation!r:.80}"
            )
        messages = plain = [_message(index, message) for index, message in enumerate(conversation)]
        if content_format == "openai":
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        messages = [_with_pictures(own, given) for own, given in zip(messages, conversation, strict=True)]
        if not messages:
            raise ValidationError("a conversation needs at least one message")
        tools = kwargs.get("tools")
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
            raise ValidationError(
                "tools must be a list of mappings such as {'type': 'function', 'function': {'name': ...}}; "
                f"got {tools!r:.80}"
            )
        if self._mistral is not None:
            if template is not None:
                raise ValidationError(_NO_TEMPLATE)
            return self._mistral.encode(messages, **kwargs)
        template = load_chat_template(template) or self._template
        if template is None and not self._tokenizer.chat_template:
            raise ValidationError("the model has no chat template: pass chat_template, or use generate()")
        try:
            text = self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
        except Exception as error:  # whatever the template does
            raise ValidationError(f"the chat template cannot render the conversation: {error}") from error
        written = str(template or self._tokenizer.chat_template)
        self._check_roles(plain, written, str(text))
        if kwargs.get("tools") and "tools" not in written and not self._told_of_tools:
            self._told_of_tools = True
            logger.warning("The chat template writes no tools: the model does not see those of a request.")
        return str(text)

    def _check_roles(self, messages: Conversation, template: str, text: str) -> None:
        """See what became of messages whose role the template does not name: most templates pass any role on, and some
        leave such messages out.

        Raises ValidationError for one that is left out and has a role that nobody knows.
        """
        for index, (role, content) in enumerate((message["role"], message["content"].strip()) for message in messages):
            if role in _ALWAYS_KNOWN or any(f"{quote}{role}{quote}" in template for quote in "'\""):
                continue
            is_there = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
            if not is_there and role not in ROLES:
                raise ValidationError(
                    f"the chat template leaves message {index} out: it does not know the role {role!r}.{_close(role)}"
                )
            if role in self._told or (is_there and role in ROLES):
                continue
            self._told.add(role)
            if is_there:
                known = ", ".join(ROLES)
                logger.warning("The chat template gets the role %r, which is none of %s.%s", role, known, _close(role))
            else:
                logger.warning("The chat template does not know the role %r: it leaves such messages out.", role)


def _close(role: str) -> str:
    close = difflib.get_close_matches(role.lower(), ROLES, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _message(index: int, message: Message) -> dict[str, Any]:
    """Return a message with its content as text, which is what templates of text models expect."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValidationError(f"message {index} must have a 'role' and a 'content', got {message!r:.80}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(_text(index, part) for part in content if part not in PICTURES)
    if not isinstance(content, str):
        raise ValidationError(f"the content of message {index} must be text, got {content!r:.80}")
    return {**message, "content": content}


def _with_pictures(message: dict[str, Any], given: Message) -> dict[str, Any]:
    """A message with its parts, where some of them stand for pictures: the template says how."""
    content = given.get("content") or ()
    if isinstance(content, str) or not any(part in PICTURES for part in content):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {**message, "content": parts}


def _text(index: int, part: Any) -> str:
    """OpenAI's content parts, as far as they are text."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValidationError(
        f"message {index} has a content part of type {kind!r}, which is not read here: only text, and for models that "
        "see images image_url, video_url, image and video."
    )
