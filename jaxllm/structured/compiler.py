"""Grammars are compiled beside the engine, each once."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import llguidance
import numpy as np

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.config.structured_outputs import StructuredOutputsConfig
from jaxllm.structured.grammar import may_name_special_tokens, serialize
from jaxllm.structured.matcher import GrammarMatcher, explain

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

#: compiled grammars that are kept
CACHE_SIZE = 256
#: grammars up to this many characters are checked before their request is accepted; that takes about a millisecond
CHECKED_AT_ONCE = 4096

#: without a dump of the parser's state in every error
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class Grammar:
    """A compiled grammar; each request gets a matcher of its own."""

    def __init__(self, prototype: llguidance.LLMatcher, num_words: int):
        self._prototype = prototype
        self._num_words = num_words

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._prototype.deep_copy(), self._num_words)


class GrammarCompiler:
    """Grammars for one tokenizer.

    Args:
        vocab_size: of the model; the tokenizer may have fewer tokens.
        eos_token_ids: what ends a text that matches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        config: StructuredOutputsConfig,
    ):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._config = config
        self._trie: llguidance.LLTokenizer | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._executor: llguidance.LLExecutor | None = None
        self._grammars: collections.OrderedDict[str, Future[Grammar]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._trie_lock = threading.Lock()

    def check(self, params: StructuredOutputsParams) -> None:
        """Refuse a grammar that can be judged quickly; what remains is said by the future of `compile`.

        Raises:
            ValidationError: it is wrong; the text says where.
        """
        text = self._serialize(params)
        with self._lock:
            known = self._grammars.get(text)
        if known is not None and known.done():
            known.result()
        elif known is None and len(text) <= CHECKED_AT_ONCE and not may_name_special_tokens(params):
            _judge(text)

    def compile(self, params: StructuredOutputsParams) -> Future[Grammar]:
        """Return the grammar, from the cache or compiled in a thread.

        The future raises ValidationError when the grammar is wrong or too complex.
        """
        text = self._serialize(params)
        with self._lock:
            future = self._grammars.get(text)
            if future is None:
                if self._pool is None:
                    workers = max(1, (os.cpu_count() or 1) // 2)
                    self._pool = concurrent.futures.ThreadPoolExecutor(workers, "jaxllm-grammar")
                future = self._grammars[text] = self._pool.submit(self._compile, text)
                if len(self._grammars) > CACHE_SIZE:
                    self._grammars.popitem(last=False)
            self._grammars.move_to_end(text)
        return future

    def fill_together(self, matchers: Sequence[GrammarMatcher]) -> None:
        """Compute the next masks of this compiler's matchers in threads."""
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        GrammarMatcher.fill_together(matchers, self._executor)

    def shutdown(self) -> None:
        """Stop the threads; idempotent."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._grammars.clear()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _serialize(self, params: StructuredOutputsParams) -> str:
        special = frozenset(map(str, self._tokenizer.all_special_tokens)) if params.structural_tag else frozenset()
        return serialize(params, self._config, special)

    def _compile(self, text: str) -> Grammar:
        trie = self._token_trie()
        matcher = llguidance.LLMatcher(trie, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _error(matcher.get_error())
        # what the first mask computes is shared by all copies
        num_words = -(-trie.vocab_size // 32)
        mask = np.zeros(num_words, np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise _error(matcher.get_error())
        if matcher.is_stopped() and not matcher.is_accepting():
            raise _error(matcher.stop_reason())
        return Grammar(matcher, num_words)

    def _token_trie(self) -> llguidance.LLTokenizer:
        """Return the tokens as llguidance wants them, made when they are first needed, which takes 0.3 to 1 s."""
        with self._trie_lock:
            if self._trie is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise ValidationError(
                        "Structured outputs need a fast tokenizer (tokenizer.json); the model's is "
                        f"{type(self._tokenizer).__name__}."
                    )
                self._trie = llguidance.LLTokenizer(
                    _serialized(backend),
                    n_vocab=max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True)),
                    eos_token=self._eos_token_ids or None,
                )
            return self._trie


def check_json_schema(schema: str) -> None:
    """Refuse a JSON schema that no engine would take, without one.

    Raises:
        ValidationError: it is wrong; the text says where.
    """
    _judge(serialize(StructuredOutputsParams(json=schema), StructuredOutputsConfig()))


def _judge(text: str) -> None:
    if error := llguidance.LLMatcher.validate_grammar(text, limits=_LIMITS):
        raise _error(error)


def _serialized(backend: Tokenizer) -> str:
    """Return a tokenizer that neither pads nor truncates, as JSON."""
    text = backend.to_str()
    if backend.padding is None and backend.truncation is None:
        return text
    return json.dumps({**json.loads(text), "padding": None, "truncation": None})


def _error(error: str) -> ValidationError:
    return ValidationError(f"Grammar error: {explain(error)}")
