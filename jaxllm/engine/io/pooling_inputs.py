"""From what the caller gives to a `Request` that pools: texts, pairs of texts, and their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import Pooler
from jaxllm.api.pooling_params import PoolingParams, truncation
from jaxllm.engine.adapters import adapter_of
from jaxllm.engine.io.late_chunking import chunks_of
from jaxllm.engine.io.prompts import PreparedPrompt, Prompt, PromptReader, TokenizationOptions, not_cut
from jaxllm.engine.request import Request
from jaxllm.tokenization.pool import backend_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.engine.adapters import AdapterStore

_OPTIONS = ("truncate_prompt_tokens", "truncation", "max_length", "truncation_side", "add_special_tokens")


@dataclasses.dataclass(frozen=True)
class TextPair:
    """Two texts that a cross-encoder reads together."""

    first: str
    second: str


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPair(PreparedPrompt):
    """A pair as token ids."""

    #: position at which the second text's segment begins
    segment_start: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedText(PreparedPrompt):
    """A text as token ids, with where in it they are."""

    offsets: Sequence[tuple[int, int]] = ()


class PoolingInputs:
    """Makes pooling requests for one model, with the interface of `InputProcessor`.

    Args:
        reader: reads what is no pair.
        model: its name, for error texts.
        lower_case: texts are lower-cased first.
        adapters: those that requests may have; None: there are none.
    """

    def __init__(
        self,
        reader: PromptReader,
        tokenizer: PreTrainedTokenizerBase | None,
        pooler: Pooler,
        *,
        model: str,
        hidden_size: int,
        max_model_len: int,
        lower_case: bool,
        adapters: AdapterStore | None = None,
    ):
        self.pooler, self._adapters = pooler, adapters
        self._model, self._hidden_size, self._max_model_len = model, hidden_size, max_model_len
        #: reads prompts; several threads may use it
        self.reader = PoolingReader(reader, tokenizer, lower_case)

    def options(self, given: Mapping[str, Any] | None, params: Sequence[PoolingParams]) -> TokenizationOptions:
        """How the texts of one call become token ids.

        ``truncate_prompt_tokens`` comes from ``tokenization_kwargs``, or from the parameters, and keeps the first
        tokens unless ``truncation_side`` is "left". Special tokens are kept.

        Raises:
            ValidationError: an unknown key, a value out of range, or parameters of one call that differ in it.
        """
        given = dict(given or {})
        for name in given:
            if name not in _OPTIONS:
                raise ValidationError(
                    f"tokenization_kwargs has the key {name!r}, which is not supported; supported: "
                    f"{', '.join(_OPTIONS)}"
                )
        asked = {p.truncate_prompt_tokens for p in params}
        if len(asked) > 1:
            raise ValidationError("truncate_prompt_tokens must be the same in all pooling_params of a call.")
        keep = given.get("truncate_prompt_tokens", next(iter(asked), None))
        if keep is None and given.get("truncation"):
            keep = given.get("max_length", -1)
        if keep is not None:
            keep = truncation(keep)
            keep = self._max_model_len if keep == -1 else keep
            if keep > self._max_model_len:
                raise ValidationError(
                    f"truncate_prompt_tokens ({keep}) is greater than max_model_len ({self._max_model_len}). Please "
                    "request a smaller truncation size."
                )
        side = given.get("truncation_side") or "right"
        if side not in ("left", "right"):
            raise ValidationError(f'truncation_side must be "left" or "right", got {side!r}.')
        special = given.get("add_special_tokens")
        chunked = any(p.late_chunking_params is not None for p in params)
        if chunked and (keep is not None or self.reader.lower_case):
            raise ValidationError(
                "Late chunking does not support input truncation or text normalization: leave truncate_prompt_tokens "
                "out"
            )
        return TokenizationOptions(
            offsets=chunked,
            add_special_tokens=None if special is None else checks.boolean("add_special_tokens", special),
            keep=keep,
            truncation_side=side,
        )

    def check(self, params: PoolingParams) -> PoolingParams:
        """A copy of the parameters with the model's defaults filled in.

        Raises:
            TypeError: they are something else.
            ValidationError: anything in them that cannot be honoured.
        """
        if not isinstance(params, PoolingParams):
            raise TypeError(f"pooling_params must be PoolingParams, got {type(params).__name__}")
        assert params.task is not None
        return params.resolved(params.task, self.pooler, model=self._model, hidden_size=self._hidden_size)

    def request(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        params: PoolingParams,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> tuple[Request, str | None]:
        """A request, of parameters that `check` returned, and the prompt's text, None when it came as token ids."""
        if isinstance(prompt, PreparedPair):
            params = dataclasses.replace(params, segment_start=prompt.segment_start)
        if params.late_chunking_params is not None:
            if not isinstance(prompt, PreparedText):
                raise ValidationError(
                    "Late chunking requires nonempty plain-text input, and a fast tokenizer, which knows tokens' places"
                )
            chunks = chunks_of(prompt.offsets, params.late_chunking_params.chunk_size)
            params = dataclasses.replace(params, late_chunking=chunks)
        adapter = adapter_of(self._adapters, lora_request)
        request = Request(
            request_id,
            prompt.token_ids,
            params,
            priority=priority,
            cache_salt=prompt.cache_salt,
            block_hashes=prompt.block_hashes if adapter is None else (),
            prompt_embeds=prompt.embeds,
            media=prompt.media,
            extra_keys=prompt.extra_keys if adapter is None else (*prompt.extra_keys, adapter.key),
            adapter=adapter,
        )
        return request, prompt.text


class PoolingReader:
    """`PromptReader` for prompts that are to be pooled: reads pairs too, and cuts texts without losing what the
    tokenizer adds around them.
    """

    def __init__(self, reader: PromptReader, tokenizer: PreTrainedTokenizerBase | None, lower_case: bool):
        self._reader, self.lower_case = reader, lower_case
        self._tokenizer = tokenizer

    @property
    def _backend(self) -> Any:
        """Another one once `EngineTokenizer.whole` is there."""
        return backend_of(self._tokenizer)

    def read(
        self, prompts: Sequence[Prompt | TextPair], options: TokenizationOptions | None = None
    ) -> list[PreparedPrompt | ValidationError]:
        """Each prompt as token ids, or why it is refused."""
        options = options or TokenizationOptions()
        if self.lower_case:
            prompts = [_lower(prompt) for prompt in prompts]
        found: list[PreparedPrompt | ValidationError | None] = [None] * len(prompts)
        others: list[int] = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, TextPair):
                found[i] = self._pair(prompt, options)
            else:
                others.append(i)
        whole = dataclasses.replace(options, keep=None)
        read = self._reader.read([prompts[i] for i in others], whole)  # pyright: ignore[reportArgumentType]
        for i, prepared in zip(others, read, strict=True):
            if not isinstance(prepared, ValidationError):
                prepared = self._located(prepared, options) if options.offsets else self._cut(prepared, options)
            found[i] = prepared
        return [item for item in found if item is not None]

    def _located(self, prompt: PreparedPrompt, options: TokenizationOptions) -> PreparedPrompt:
        """A text with the places of its tokens; any other prompt as it is."""
        # a picture of one vector has as many tokens as its mark in the text
        if not prompt.text or prompt.embeds is not None or prompt.media is not None or self._backend is None:
            return prompt
        encoding = self._backend.encode(prompt.text, add_special_tokens=options.add_special_tokens is not False)
        if encoding.ids != prompt.token_ids:
            return prompt
        offsets = encoding.offsets
        return PreparedText(prompt.token_ids, prompt.text, prompt.cache_salt, prompt.block_hashes, offsets=offsets)

    def _cut(self, prompt: PreparedPrompt, options: TokenizationOptions) -> PreparedPrompt | ValidationError:
        keep = options.keep
        if keep is None or len(prompt.token_ids) <= keep:
            return prompt
        if prompt.media is not None:
            return not_cut(len(prompt.token_ids), keep)
        if prompt.embeds is not None:
            cut = prompt.with_token_ids(options.cut(prompt.token_ids))
            return dataclasses.replace(cut, embeds=options.cut(prompt.embeds))
        backend, room = self._backend, 0
        if prompt.text is not None and backend is not None and options.add_special_tokens is not False:
            room = keep - backend.num_special_tokens_to_add(False)
        if backend is None or room <= 0:
            return prompt.with_token_ids(options.cut(prompt.token_ids))
        encoding = backend.encode(prompt.text, add_special_tokens=False)
        encoding.truncate(room, direction=options.truncation_side)
        return prompt.with_token_ids(backend.post_process(encoding, None, True).ids)

    def _pair(self, pair: TextPair, options: TokenizationOptions) -> PreparedPrompt | ValidationError:
        backend = self._backend
        if backend is None:
            return ValidationError(
                "scoring a pair needs a tokenizer of the tokenizers library, which the engine has not"
            )
        try:
            parts = [backend.encode(text, add_special_tokens=False) for text in (pair.first, pair.second)]
        except UnicodeEncodeError as error:
            return ValidationError(f"text with a lone surrogate ({error}) cannot be tokenized: {pair!r:.80}")
        special = options.add_special_tokens is not False
        if options.keep is not None:
            room = options.keep - (backend.num_special_tokens_to_add(True) if special else 0)
            lengths = longest_first(len(parts[0].ids), len(parts[1].ids), max(room, 0))
            for part, length in zip(parts, lengths, strict=True):
                part.truncate(length, direction=options.truncation_side)
        whole = backend.post_process(*parts, special)
        start = whole.type_ids.index(1) if 1 in whole.type_ids else None
        if not whole.ids:
            return ValidationError("The prompt cannot be empty")
        if self._reader.media is not None:
            try:
                self._reader.media.check_no_places(whole.ids)
            except ValidationError as error:
                return error
        return PreparedPair(whole.ids, segment_start=start)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts cut to `room` tokens together, one token at a time off the longer, the second when equal.

    As transformers' ``truncation="longest_first"``.
    """
    excess = max(first + second - room, 0)
    level = min(excess, abs(first - second))
    first, second = (first - level, second) if first > second else (first, second - level)
    rest = excess - level
    return max(first - rest // 2, 0), max(second - (rest + 1) // 2, 0)


def _lower(prompt: Any) -> Any:
    if isinstance(prompt, TextPair):
        return TextPair(prompt.first.lower(), prompt.second.lower())
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return {**prompt, "prompt": prompt["prompt"].lower()}
    return prompt.lower() if isinstance(prompt, str) else prompt
