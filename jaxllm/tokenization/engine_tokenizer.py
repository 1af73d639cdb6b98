"""What an engine asks of a tokenizer, without transformers."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class EngineTokenizer:
    """A tokenizer of the tokenizers library, and transformers' one, made when something is asked that only that has:
    chat templates, special tokens by name. Prompts, texts and ids need none of it, and importing transformers takes
    most of a second and some tens of megabytes.

    Args:
        backend: adds the special tokens that transformers' one adds, and neither pads nor cuts.
        make: transformers' one, in whatever thread asks first. Others may use the backend meanwhile.
    """

    #: tokenizers of Mistral's own files are transformers' from the start
    mistral_chat = None

    def __init__(self, backend: Tokenizer, eos_token_id: int | None, make: Callable[[], PreTrainedTokenizerBase]):
        self._backend, self._eos_token_id = backend, eos_token_id
        self._make: Callable[[], PreTrainedTokenizerBase] | None = make
        self._whole: Any = None
        self._lock = threading.Lock()

    @property
    def whole(self) -> PreTrainedTokenizerBase:
        """Transformers' one. What is changed of it, the engine's texts follow from then on."""
        with self._lock:
            if self._whole is None:
                assert self._make is not None
                self._whole = _not_interrupted(self._make)
                # what they hold is not to be there twice
                self._make, self._backend = None, self._whole.backend_tokenizer
            return self._whole

    @property
    def backend_tokenizer(self) -> Tokenizer:
        return self._backend if self._whole is None else self._whole.backend_tokenizer

    @property
    def split_special_tokens(self) -> bool:
        """As transformers has it: a backend that does so is not begun with."""
        return self._whole is not None and bool(self._whole.split_special_tokens)

    @property
    def eos_token_id(self) -> int | None:
        return self._eos_token_id if self._whole is None else self._whole.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """The ids of a text. `verbose`: as transformers has it, of a warning that is not given here."""
        if self._whole is not None:
            return self._whole.encode(text, add_special_tokens=add_special_tokens, verbose=verbose)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        if self._whole is not None:
            return str(self._whole.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask before anything is there
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __len__(self) -> int:
        return len(self.whole)


def _not_interrupted(make: Callable[[], Any]) -> Any:
    """What `make` returns. Ctrl-C ends the caller, after that: what is imported by half breaks the process."""
    if threading.current_thread() is not threading.main_thread():
        return make()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        try:
            future = thread.submit(make)
        except RuntimeError:  # the program is ending, and takes no more threads
            return make()
        return future.result()
