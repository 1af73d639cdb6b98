"""Workers turn prompts into token ids while the engine runs.

They are threads: the tokenizers library encodes a batch outside the interpreter's lock and spreads it over the cores,
so threads give what processes give, without copying ids between processes or a ``__main__`` guard in the caller's
script (`jaxllm bench tokenizer` measures both batch and worker count). What makes the difference is batching: a prompt
at a time is two to three times slower than 64 at once.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")

#: prompts that a worker takes at once
BATCH = 64
#: threads for work that waits for other machines, or takes seconds: so that texts need not wait for it
_SLOW_WORKERS = 4


class TokenizerPool:
    """Runs work on prompts in `workers` threads; 0: in the caller's thread, which a server's must not wait in for slow
    work: that always has threads of its own.

    The threads start with the first work and end with `shutdown`.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = None
        self._ended = False
        if workers:
            self._executor = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tokenizer")
        self._slow = concurrent.futures.ThreadPoolExecutor(_SLOW_WORKERS, thread_name_prefix="media")

    def submit(
        self, work: Callable[..., Result], *arguments: Any, slow: bool = False
    ) -> concurrent.futures.Future[Result]:
        """Return the result of `work`, some time later; a RuntimeError after `shutdown`.

        Args:
            slow: whether it may take long, and is done in threads of its own.
        """
        executor = self._slow if slow else self._executor
        if executor is not None and not self._ended:
            try:
                return executor.submit(self._do, work, *arguments)
            except RuntimeError:
                # The pool has just ended; or the main thread has, after which executors take nothing more: the user's
                # own thread, which the interpreter waits for, does it by itself.
                pass
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        try:
            future.set_result(self._do(work, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def _do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        if self._ended:
            raise RuntimeError("the engine has been shut down; make a new LLM")
        return work(*arguments)

    def shutdown(self) -> None:
        """Let what has not begun fail, so that nobody waits for it, and the threads end; idempotent."""
        self._ended = True
        for executor in (self._executor, self._slow):
            if executor is not None:
                executor.shutdown(wait=False)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
    """Return each text's token ids, as ``tokenizer.encode`` gives them, in one call of the library where it has one.

    Raises:
        ValidationError: a text that is no Unicode.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(f"text with a lone surrogate ({error}) cannot be tokenized: {text!r:.80}") from None
    backend = backend_of(tokenizer)
    if backend is None or len(texts) == 1:
        # not verbose: how long a prompt may be is the engine's to say
        return [
            list(tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False))  # pyright: ignore
            for text in texts
        ]
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    return [encoding.ids for encoding in encodings]


def backend_of(tokenizer: PreTrainedTokenizerBase | None) -> Tokenizer | None:
    """The part of a tokenizer that is of the tokenizers library, None where there is none. It neither cuts nor pads:
    a user's call of `LLM.get_tokenizer()` with `truncation`, `padding` or `split_special_tokens` leaves these set.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        splits = getattr(tokenizer, "split_special_tokens", backend.encode_special_tokens)
        if backend.encode_special_tokens != splits:
            backend.encode_special_tokens = splits
    return backend
