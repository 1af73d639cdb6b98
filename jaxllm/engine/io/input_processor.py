"""From what the caller gives to a `Request`: tokenize, check everything that can be checked, refuse with the reason."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import float32
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.api.torch_logits_processor import REQUEST
from jaxllm.engine.adapters import adapter_of
from jaxllm.engine.io.prompts import PreparedPrompt, Prompt, PromptReader
from jaxllm.engine.request import Request
from jaxllm.engine.step import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES
from jaxllm.tokenization.pool import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.api.torch_logits_processor import HostProcessor
    from jaxllm.engine.adapters import AdapterStore
    from jaxllm.engine.cache.block_hash import BlockHasher
    from jaxllm.engine.io.prompt_embeds import EmbedsReader
    from jaxllm.engine.io.token_constraints import TokenConstraints
    from jaxllm.multimodal.prompts import MediaReader
    from jaxllm.tokenization.chat import ChatRenderer


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedParams:
    """Sampling parameters that this model can honour; shared by all requests of a call."""

    params: SamplingParams
    #: token sequences that must not be generated
    bad_words: tuple[tuple[int, ...], ...]


class InputProcessor:
    """Makes requests for one model.

    Args:
        tokenizer: None when the engine was built without one; then only token ids are taken.
        vocab_size: token ids must be below it.
        eos_token_ids: the model's own ends of generation.
        max_logprobs: most alternatives a request may ask for; -1: the vocabulary.
        extra_args: the names that logits processors declare.
        on_host: processors that take any others.
        seed: the engine's seed, from which requests without one get theirs.
        constraints: judges structured outputs and thinking budgets.
        hasher: names the prompts' full blocks for the prefix cache; None: there is none.
        embeds: reads prompts that are vectors; None: there are none.
        media: reads what prompts hold besides text; None: the model takes nothing else.
        adapters: those that requests may have; None: there are none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        renderer: ChatRenderer,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_logprobs: int,
        extra_args: frozenset[str],
        on_host: Sequence[HostProcessor] = (),
        seed: int,
        constraints: TokenConstraints | None = None,
        hasher: BlockHasher | None = None,
        embeds: EmbedsReader | None = None,
        media: MediaReader | None = None,
        adapters: AdapterStore | None = None,
    ):
        self.tokenizer, self._adapters = tokenizer, adapters
        #: reads prompts; several threads may use it
        self.reader = PromptReader(tokenizer, renderer, vocab_size, hasher, embeds, media)
        self._vocab_size = vocab_size
        # some checkpoints name ends that their vocabulary does not have
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._max_logprobs = max_logprobs
        self._extra_args, self._on_host = extra_args - {REQUEST}, on_host
        self._seed = seed
        self._constraints = constraints
        self._count = 0

    def check(self, params: SamplingParams) -> CheckedParams:
        """A checked copy of the caller's parameters.

        Raises:
            TypeError: they are something else.
            ValidationError: anything in them that cannot be honoured.
        """
        if not isinstance(params, SamplingParams):
            how = ": pass SamplingParams(**it)" if isinstance(params, dict) else ""
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}{how}")
        params = params.clone()
        self._check_params(params)
        checked = CheckedParams(params, self._bad_words(params))
        self._check_something_is_allowed(checked)
        return checked

    def request(
        self,
        request_id: str,
        prompt: Prompt | PreparedPrompt,
        params: SamplingParams | CheckedParams,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> tuple[Request, str | None]:
        """A checked request and the prompt's text, None when it came as token ids.

        Raises:
            ValidationError: anything in the prompt or the parameters that cannot be honoured.
        """
        if not isinstance(prompt, PreparedPrompt):
            (read,) = self.reader.read([prompt])
            if isinstance(read, ValidationError):
                raise read
            prompt = read
        checked = params if isinstance(params, CheckedParams) else self.check(params)
        if prompt.embeds is not None and checked.params.prompt_logprobs is not None:
            raise ValidationError(
                "prompt_logprobs is not compatible with prompt embeds: a vector is no token that could be likely."
            )
        adapter = adapter_of(self._adapters, lora_request)
        request = Request(
            request_id,
            prompt.token_ids,
            checked.params,
            eos_token_ids=self.eos_token_ids,
            seed=self._request_seed(checked.params),
            priority=priority,
            cache_salt=prompt.cache_salt,
            # what is known of the blocks is without an adapter
            block_hashes=prompt.block_hashes if adapter is None else (),
            prompt_embeds=prompt.embeds,
            extra_keys=prompt.extra_keys if adapter is None else (*prompt.extra_keys, adapter.key),
            media=prompt.media,
            adapter=adapter,
        )
        request.bad_words = checked.bad_words
        return request, prompt.text

    def _check_params(self, params: SamplingParams) -> None:
        self._check_extra_args(params)
        params.check_against(vocab_size=self._vocab_size, max_logprobs=self._max_logprobs)
        if self._constraints is not None:
            self._constraints.check(params)
        if params.stop and self.tokenizer is None:
            raise ValidationError("stop strings need a tokenizer, and skip_tokenizer_init=True: use stop_token_ids")
        if len(params.logit_bias or ()) > MAX_BIASES:
            raise ValidationError(
                f"logit_bias has {len(params.logit_bias or ())} entries; at most {MAX_BIASES} are supported. "
                "To forbid or allow many tokens use allowed_token_ids."
            )

    def _check_extra_args(self, params: SamplingParams) -> None:
        for host in self._on_host:
            host.validate(params)
        for name, value in (params.extra_args or {}).items():
            if name not in self._extra_args and self._on_host and name != REQUEST:
                # it is for one of them, which takes values of any kind
                continue
            if name not in self._extra_args:
                declared = ", ".join(sorted(self._extra_args)) or "none"
                raise ValidationError(
                    f"extra_args has {name!r}, which no logits processor declares (declared: {declared}). Leave it "
                    "out, or declare it: logits_processors=[LogitsProcessor(function, extra_args={name: default})]."
                )
            float32(f"extra_args[{name!r}]", value)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the banned words, each as it is spelled at the start and after a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise ValidationError("bad_words need a tokenizer, and skip_tokenizer_init=True: use logit_bias")
        spelled = [variant for word in params.bad_words for variant in (word.lstrip(), " " + word.lstrip())]
        encoded = encode(self.tokenizer, spelled, special_tokens=False)
        found = tuple(dict.fromkeys(tuple(ids) for ids in encoded if ids))
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

    def _check_something_is_allowed(self, checked: CheckedParams) -> None:
        """Refuse masks that leave no token at all."""
        params = checked.params
        if params.allowed_token_ids is None:
            return
        left = set(params.allowed_token_ids) - {words[0] for words in checked.bad_words if len(words) == 1}
        if params.min_tokens:
            left -= self.eos_token_ids.union(params.stop_token_ids or ())
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
        return seed_of(self._seed, self._count)


def seed_of(engine_seed: int, count: int) -> int:
    """The seed of the request that is the `count`-th one without a seed of its own, in [0, 2^64)."""
    digest = hashlib.blake2b(f"{engine_seed}:{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
