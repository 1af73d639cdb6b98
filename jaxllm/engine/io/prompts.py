"""What a caller may give as a prompt, and how it becomes token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.engine.cache.block_hash import ExtraKey
from jaxllm.engine.io.prompt_embeds import EmbedsReader
from jaxllm.multimodal.conversations import has_media
from jaxllm.multimodal.items import Media, PromptMedia
from jaxllm.multimodal.prompts import MEDIA_KEYS, is_given
from jaxllm.tokenization.pool import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.engine.cache.block_hash import BlockHasher
    from jaxllm.multimodal.prompts import MediaReader
    from jaxllm.tokenization.chat import ChatRenderer

Prompt = str | Sequence[int] | Mapping[str, Any]
Cut = TypeVar("Cut", list[int], np.ndarray)

#: what `ChatRenderer.render` takes, by the keys of a prompt with messages
_CHAT_KEYS = (
    "messages",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "chat_template_content_format",
    "add_generation_prompt",
    "continue_final_message",
)
#: names that `ChatRenderer.render` gets from other keys
_RENDER_OPTIONS = ("template", "content_format", "add_generation_prompt", "continue_final_message", "tools")
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "prompt_embeds", "messages", "cache_salt", *MEDIA_KEYS)
#: of a prompt with vectors
_EMBEDS_KEYS = ("prompt_embeds", "prompt", "cache_salt")
#: vLLM's others
_LATER_KEYS = ("encoder_prompt", "decoder_prompt")
_TRUNCATION_SIDES = ("left", "right")
_TEXT_ONLY = (
    ", and this engine reads text only: its model sees no images here, or limit_mm_per_prompt has switched them off. "
    "Leave it out."
)


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as token ids."""

    token_ids: list[int]
    #: None when it came as token ids
    text: str | None = None
    cache_salt: str | None = None
    #: of leading full blocks of `token_ids`, made where the prompt is read so that the engine's thread need not
    block_hashes: Sequence[bytes] = ()
    #: [tokens, hidden size], where the prompt came so; `token_ids` are zeros then, as many
    embeds: np.ndarray | None = dataclasses.field(default=None, compare=False)
    #: what it holds besides tokens, and what names the content of that
    media: PromptMedia | None = dataclasses.field(default=None, compare=False)
    extra_keys: tuple[ExtraKey, ...] = ()

    def with_token_ids(self, token_ids: list[int]) -> Self:
        """The same prompt with other tokens."""
        return dataclasses.replace(self, token_ids=token_ids, block_hashes=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationOptions:
    """How texts become token ids: vLLM's ``tokenization_kwargs``."""

    #: None: yes, except where a chat template has written them
    add_special_tokens: bool | None = None
    #: tokens that are kept of a longer prompt; None: all
    keep: int | None = None
    #: which end of the prompt is cut off
    truncation_side: str = "left"
    #: whether it is kept where in a text each token is
    offsets: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, *, max_model_len: int) -> TokenizationOptions:
        """Options from ``tokenization_kwargs``.

        ``truncate_prompt_tokens=N`` keeps the last N tokens (-1: as many as leave room for one output), and
        ``truncation=True, max_length=N`` the first N, both changed by ``truncation_side``.

        Raises:
            ValidationError: an unknown key, or a value out of range.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ValidationError(f"tokenization_kwargs must be a dict, got {given!r:.80}")
        known = ("add_special_tokens", "truncate_prompt_tokens", "truncation", "max_length", "truncation_side")
        for name in given:
            if name not in known:
                raise ValidationError(
                    f"tokenization_kwargs has the key {name!r}, which is not supported; supported: {', '.join(known)}"
                )
        special = given.get("add_special_tokens")
        keep, side = given.get("truncate_prompt_tokens"), "left"
        if keep is None and given.get("truncation"):
            keep, side = given.get("max_length"), "right"
        if keep is not None:
            keep = checks.integer("truncate_prompt_tokens", keep)
            keep = max_model_len - 1 if keep == -1 else keep
            if not 1 <= keep:
                raise ValidationError(f"truncate_prompt_tokens must be at least 1, or -1 for what fits, got {keep}.")
        side = given.get("truncation_side") or side
        if side not in _TRUNCATION_SIDES:
            raise ValidationError(f'truncation_side must be "left" or "right", got {side!r}.')
        return cls(
            add_special_tokens=None if special is None else checks.boolean("add_special_tokens", special),
            keep=keep,
            truncation_side=side,
        )

    def cut(self, ids: Cut) -> Cut:
        """What is kept of the tokens of a prompt, or of its vectors."""
        if self.keep is None or len(ids) <= self.keep:
            return ids
        return ids[-self.keep :] if self.truncation_side == "left" else ids[: self.keep]


def not_cut(count: int, keep: int) -> ValidationError:
    """Why a prompt with images is refused that has more tokens than are to be kept."""
    return ValidationError(
        f"the prompt has {count} tokens with those of its images, and truncate_prompt_tokens would cut it to {keep}: a "
        "prompt with images is not cut. Make it or its images smaller."
    )


def holds_media(prompt: Prompt) -> bool:
    """Whether pictures or videos have to be read for a prompt."""
    return isinstance(prompt, Mapping) and (
        any(is_given(prompt.get(key)) for key in MEDIA_KEYS) or has_media(prompt.get("messages"))
    )


class PromptReader:
    """Reads prompts of every form for one model; safe to use from several threads.

    Args:
        tokenizer: None when the engine was built without one; then only token ids are taken.
        vocab_size: token ids must be below it.
        hasher: names the prompts' full blocks for the prefix cache; None: there is none.
        embeds: reads vectors; None: the engine was not started for them.
        media: reads what prompts hold besides text; None: the model takes nothing else.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        renderer: ChatRenderer,
        vocab_size: int,
        hasher: BlockHasher | None = None,
        embeds: EmbedsReader | None = None,
        media: MediaReader | None = None,
    ):
        self._hasher, self._embeds = hasher, embeds
        self._tokenizer = tokenizer
        self.media = media
        self._renderer = renderer
        self._vocab_size = vocab_size

    def read(
        self, prompts: Sequence[Prompt], options: TokenizationOptions | None = None
    ) -> list[PreparedPrompt | ValidationError]:
        """Each prompt as token ids, or why it is refused; texts are tokenized together."""
        options = options or TokenizationOptions()
        read: list[PreparedPrompt | ValidationError | None] = []
        texts: dict[bool, list[tuple[int, str, str | None]]] = {True: [], False: []}
        media: dict[int, list[Media]] = {}
        given: dict[int, str] = {}
        for position, prompt in enumerate(prompts):
            read.append(None)
            try:
                if isinstance(prompt, Mapping) and prompt.get("prompt_embeds") is not None:
                    read[position] = self._embedded(prompt, options)
                    continue
                if isinstance(prompt, Mapping) and has_media(prompt.get("messages")):
                    if self.media is None:
                        raise ValidationError(f"a message has a part that is no text{_TEXT_ONLY}")
                    prompt = self.media.of_conversation(prompt)
                text, ids, salt, special = self._parts(prompt)
                if isinstance(prompt, Mapping) and any(is_given(prompt.get(key)) for key in MEDIA_KEYS):
                    media[position] = self._items(prompt)
                if ids is not None:
                    read[position] = self._prepared(ids, text, salt, options, media.get(position))
                else:
                    if options.add_special_tokens is not None:
                        special = options.add_special_tokens
                    assert text is not None
                    if self.media is not None and media.get(position):
                        given[position], text = text, self.media.text_of(text)
                    texts[special].append((position, text, salt))
            except ValidationError as error:
                read[position] = error
        for special, waiting in texts.items():
            for (position, text, salt), ids in zip(waiting, self._encode(waiting, special), strict=True):
                try:
                    if isinstance(ids, ValidationError):
                        raise ids
                    shown = given.get(position, text)
                    read[position] = self._prepared(ids, shown, salt, options, media.get(position))
                except ValidationError as error:
                    read[position] = error
        return [item for item in read if item is not None]

    def _encode(self, waiting: list[tuple[int, str, str | None]], special: bool) -> list[list[int] | ValidationError]:
        if not waiting:
            return []
        if self._tokenizer is None:
            why = "the engine has no tokenizer (skip_tokenizer_init=True): give prompt_token_ids"
            return [ValidationError(why) for _ in waiting]
        try:
            return list(encode(self._tokenizer, [text for _, text, _ in waiting], special_tokens=special))
        except ValidationError as error:
            if len(waiting) == 1:
                return [error]
            # one of them: find it
            return [result for item in waiting for result in self._encode([item], special)]

    def _parts(self, prompt: Prompt) -> tuple[str | None, list[int] | None, str | None, bool]:
        """(text, token ids, cache salt, whether special tokens are to be added)."""
        if isinstance(prompt, str):
            return prompt, None, None, True
        if not isinstance(prompt, Mapping):
            return None, self._ids(prompt), None, False
        allowed = (*_PROMPT_KEYS, *_CHAT_KEYS) if "messages" in prompt else _PROMPT_KEYS
        for key in prompt:
            if key not in allowed:
                why = "is not supported yet" if key in _LATER_KEYS else "does not exist"
                raise ValidationError(
                    f"the prompt has the key {key!r}, which {why}; supported: {', '.join(_PROMPT_KEYS)}"
                )
        salt = _salt(prompt)
        if prompt.get("prompt_token_ids") is not None:
            return prompt.get("prompt"), self._ids(prompt["prompt_token_ids"]), salt, False
        if "messages" in prompt and prompt.get("prompt") is None:
            # a chat template writes the special tokens itself
            rendered = self._render(prompt)
            return (rendered, None, salt, False) if isinstance(rendered, str) else (None, rendered, salt, False)
        if "prompt" not in prompt:
            raise ValidationError(
                "the prompt must have 'prompt', 'prompt_token_ids', 'prompt_embeds' or 'messages', got "
                f"{sorted(prompt)}"
            )
        if isinstance(prompt["prompt"], str):
            return prompt["prompt"], None, salt, True
        return None, self._ids(prompt["prompt"]), salt, False

    def _items(self, prompt: Mapping[str, Any]) -> list[Media]:
        """What a prompt holds besides text."""
        if self.media is None:
            given = next(key for key in MEDIA_KEYS if is_given(prompt.get(key)))
            raise ValidationError(f"the prompt has {given!r}{_TEXT_ONLY}")
        return self.media.read(prompt)

    def _embedded(self, prompt: Mapping[str, Any], options: TokenizationOptions) -> PreparedPrompt:
        """A prompt that is vectors."""
        if self._embeds is None:
            raise ValidationError(
                "You must set `--enable-prompt-embeds` to input `prompt_embeds`: LLM(..., enable_prompt_embeds=True)."
            )
        for key in prompt:
            if key not in _EMBEDS_KEYS:
                raise ValidationError(
                    f"the prompt has the key {key!r} beside 'prompt_embeds', which takes a 'prompt' (the text that the "
                    "output shows) and a 'cache_salt' besides"
                )
        text, salt = prompt.get("prompt"), _salt(prompt)
        if text is not None and not isinstance(text, str):
            raise ValidationError(f"'prompt' beside 'prompt_embeds' must be a text, got {text!r:.80}")
        embeds = options.cut(self._embeds.read(prompt["prompt_embeds"]))
        ids = [0] * len(embeds)
        hashes = self._hasher.hash_prompt(ids, salt, embeds) if self._hasher is not None else ()
        return PreparedPrompt(ids, text, salt, hashes, embeds)

    def _render(self, prompt: Mapping[str, Any]) -> str | list[int]:
        continues = checks.boolean("continue_final_message", prompt.get("continue_final_message", False))
        generates = checks.boolean("add_generation_prompt", prompt.get("add_generation_prompt", True))
        options = prompt.get("chat_template_kwargs") or {}
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise ValidationError(f"chat_template_kwargs must be a dict with string keys, got {options!r:.80}")
        taken = [name for name in options if name in _RENDER_OPTIONS]
        if taken:
            raise ValidationError(f"chat_template_kwargs has {taken[0]!r}, which is an argument of its own")
        return self._renderer.render(
            prompt["messages"],
            template=prompt.get("chat_template"),
            content_format=prompt.get("chat_template_content_format") or "auto",
            add_generation_prompt=generates and not continues,
            continue_final_message=continues,
            tools=prompt.get("tools"),
            **options,
        )

    def _prepared(
        self,
        ids: list[int],
        text: str | None,
        salt: str | None,
        options: TokenizationOptions,
        items: list[Media] | None = None,
    ) -> PreparedPrompt:
        media, keys = None, ()
        if items and self.media is not None:
            ids, media = self.media.place(ids, items)
            if options.keep is not None and len(ids) > options.keep:
                raise not_cut(len(ids), options.keep)
            keys = tuple(ExtraKey(kind="mm", value=item.key, start=item.start, stop=item.stop) for item in media.items)
        elif self.media is not None:
            self.media.check_no_places(ids)
        ids = options.cut(ids)
        if not ids:
            raise ValidationError("The decoder prompt cannot be empty")
        for token in (max(ids), min(ids)):
            if not 0 <= token < self._vocab_size:
                raise ValidationError(
                    f"Token id {token} is out of vocabulary: the model has {self._vocab_size} tokens, "
                    f"0 to {self._vocab_size - 1}"
                )
        hashes = self._hasher.hash_prompt(ids, salt, extra_keys=keys) if self._hasher is not None else ()
        return PreparedPrompt(ids, text, salt, hashes, media=media, extra_keys=keys)

    @staticmethod
    def _ids(ids: Any) -> list[int]:
        checks.no_table("the prompt", ids)
        try:
            if isinstance(ids, (bytes, bytearray)):
                raise TypeError
            ids = list(ids)
            wrong = next((i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__")), None)
        except TypeError:
            raise ValidationError(
                f"a prompt must be text or token ids, got {type(ids).__name__}: {ids!r:.80}{_hint(ids)}"
            ) from None
        if ids and all(isinstance(i, str) for i in ids):
            raise ValidationError(
                f"a prompt must be text or token ids, got a list of texts: {ids!r:.80}. Several prompts are one "
                "list of texts, such as ['a', 'b']."
            )
        if wrong is not None:
            raise ValidationError(f"token ids must be integers, got {wrong!r:.80}")
        return [int(i) for i in ids]


def _salt(prompt: Mapping[str, Any]) -> str | None:
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValidationError(f"cache_salt must be a non-empty string, got {salt!r}")
    return salt


def _hint(value: Any) -> str:
    """What tables have where nothing is."""
    is_nan = isinstance(value, float) and value != value
    is_empty = is_nan or type(value).__name__ in ("NoneType", "NAType", "NaTType")
    return ", an empty cell perhaps: leave such rows out, or give text in their place" if is_empty else ""
