"""From what the caller gives to a `Request`: tokenize, check everything that can be checked, refuse with the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.engine.request import Request
from jaxllm.errors import ValidationError
from jaxllm.runner.interface import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES
from jaxllm.sampling_params import SamplingParams, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Mapping[str, Any]
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
#: vLLM's others
_LATER_KEYS = (
    "prompt_embeds",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "encoder_prompt",
    "decoder_prompt",
)


class InputProcessor:
    """Makes requests for one model.

    Args:
        tokenizer: None when the engine was built without one; then only token ids are taken.
        vocab_size: token ids must be below it.
        eos_token_ids: the model's own ends of generation.
        max_logprobs: most alternatives a request may ask for; -1: the vocabulary.
        seed: the engine's seed, from which requests without one get theirs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_logprobs: int,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        # some checkpoints name ends that their vocabulary does not have
        self._eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._max_logprobs = max_logprobs
        self._seed = seed
        self._count = 0

    def request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, special_tokens: bool = True
    ) -> tuple[Request, str | None]:
        """A checked request and the prompt's text, None when it came as token ids.

        Args:
            prompt: text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids`` and optionally ``cache_salt``.
            special_tokens: whether the tokenizer adds its own (BOS); chat templates have them already.

        Raises:
            ValidationError: anything in the prompt or the parameters that cannot be honoured.
        """
        text, ids, salt = self._prompt(prompt, special_tokens)
        self._check_ids(ids)
        params = params.clone()
        self._check_params(params)
        request = Request(
            request_id,
            ids,
            params,
            eos_token_ids=self._eos_token_ids,
            seed=self._request_seed(params),
            priority=priority,
            cache_salt=salt,
        )
        request.bad_words = self._bad_words(params)
        self._check_something_is_allowed(request)
        return request, text

    def _prompt(self, prompt: Prompt, special_tokens: bool) -> tuple[str | None, list[int], str | None]:
        salt = None
        if isinstance(prompt, Mapping):
            for key in prompt:
                if key not in _PROMPT_KEYS:
                    why = "is not supported yet" if key in _LATER_KEYS else "does not exist"
                    raise ValidationError(
                        f"the prompt has the key {key!r}, which {why}; supported: {', '.join(_PROMPT_KEYS)}"
                    )
            salt = prompt.get("cache_salt")
            if salt is not None and not (isinstance(salt, str) and salt):
                raise ValidationError(f"cache_salt must be a non-empty string, got {salt!r}")
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), self._ids(prompt["prompt_token_ids"]), salt
            if "prompt" not in prompt:
                raise ValidationError(f"the prompt must have 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._tokenize(prompt, special_tokens), salt
        return None, self._ids(prompt), salt

    def _tokenize(self, text: str, special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValidationError("the engine has no tokenizer (skip_tokenizer_init=True): give prompt_token_ids")
        return self._encode(text, special_tokens)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(f"text with a lone surrogate ({error}) cannot be tokenized: {text!r:.80}") from None
        # not verbose: how long a prompt may be is the engine's to say
        return list(self.tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False))

    @staticmethod
    def _ids(ids: Any) -> list[int]:
        try:
            if isinstance(ids, (bytes, bytearray)):
                raise TypeError
            ids = list(ids)
            wrong = next((i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__")), None)
        except TypeError:
            raise ValidationError(
                f"a prompt must be text or token ids, got {type(ids).__name__}: {ids!r:.80}"
            ) from None
        if wrong is not None:
            raise ValidationError(f"token ids must be integers, got {wrong!r:.80}")
        return [int(i) for i in ids]

    def _check_ids(self, ids: list[int]) -> None:
        if not ids:
            raise ValidationError("The decoder prompt cannot be empty")
        for token in (max(ids), min(ids)):
            if not 0 <= token < self._vocab_size:
                raise ValidationError(
                    f"Token id {token} is out of vocabulary: the model has {self._vocab_size} tokens, "
                    f"0 to {self._vocab_size - 1}"
                )

    def _check_params(self, params: SamplingParams) -> None:
        reason = unsupported(params)
        if reason:
            raise ValidationError(reason)
        params.check_against(vocab_size=self._vocab_size, max_logprobs=self._max_logprobs)
        if params.stop and self.tokenizer is None:
            raise ValidationError("stop strings need a tokenizer, and skip_tokenizer_init=True: use stop_token_ids")
        if len(params.logit_bias or ()) > MAX_BIASES:
            raise ValidationError(
                f"logit_bias has {len(params.logit_bias or ())} entries; at most {MAX_BIASES} are supported. "
                "To forbid or allow many tokens use allowed_token_ids."
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the banned words, each as it is spelled at the start and after a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise ValidationError("bad_words need a tokenizer, and skip_tokenizer_init=True: use logit_bias")
        spelled = [variant for word in params.bad_words for variant in (word.lstrip(), " " + word.lstrip())]
        encoded = (tuple(self._encode(variant, False)) for variant in spelled)
        found = tuple(dict.fromkeys(ids for ids in encoded if ids))
        longest = max(map(len, found), default=0)
        if longest > MAX_BAD_WORD_TOKENS:
            raise ValidationError(f"a bad word has {longest} tokens; at most {MAX_BAD_WORD_TOKENS} are supported")
        sequences = sum(len(ids) > 1 for ids in found)
        if sequences > MAX_BAD_WORDS:
            raise ValidationError(
                f"bad_words make {sequences} token sequences; at most {MAX_BAD_WORDS} are supported "
                "(a word makes up to two, with and without a leading space)"
            )
        return found

    @staticmethod
    def _check_something_is_allowed(request: Request) -> None:
        """Refuse masks that leave no token at all."""
        params = request.params
        if params.allowed_token_ids is None:
            return
        left = set(params.allowed_token_ids) - {words[0] for words in request.bad_words if len(words) == 1}
        if params.min_tokens:
            left -= request.stop_token_ids
        if not left:
            raise ValidationError(
                f"allowed_token_ids={params.allowed_token_ids[:8]}, bad_words and min_tokens together leave no token "
                "to generate"
            )

    def _request_seed(self, params: SamplingParams) -> int:
        """The caller's seed, or one that depends on the engine's seed and on how many requests came before."""
        if params.seed is not None:
            return params.seed % 2**64
        self._count += 1
        digest = hashlib.blake2b(f"{self._seed}:{self._count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
