"""There is one way to a tokenizer, whatever form the model comes in."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.weights.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: a directory without any of these has no tokenizer that transformers could build
_FILES = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
#: transformers imports its parts when they are asked for, and fails where two threads ask at once
_transformers = threading.Lock()


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a ``.gguf`` file, or of a local directory in Hugging Face's layout.

    Nothing is fetched. Raises ``WeightsError`` when there is no such file or directory, when a GGUF file's tokenizer
    cannot be built, when the directory has none, or when transformers cannot load it.
    """
    path = Path(path)
    if path.is_dir():
        if not any(found for pattern in _FILES for found in path.glob(pattern)):
            raise WeightsError(
                f"{path}: there is no tokenizer: tokenizer.json is missing, and so is any other form of one. Put the "
                "model's tokenizer.json there; or pass tokenizer=..., a folder, .gguf file or hub id that has one; or "
                "skip_tokenizer_init=True, and prompts as token ids."
            )
        with _with_transformers():
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise WeightsError(f"{path}: its tokenizer cannot be loaded: {error}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # tokenizer.json may say both, from training; how long prompts are is the caller's to say
            backend.no_truncation()
            backend.no_padding()
        return tokenizer
    if not path.exists():
        raise WeightsError(f"{path}: no such file or directory; a tokenizer comes from a .gguf file or a directory")
    from jaxllm.tokenization.gguf import tokenizer_from_gguf
    from jaxllm.weights.formats.gguf import read_metadata

    metadata = read_metadata(path)
    with _with_transformers():
        try:
            return tokenizer_from_gguf(metadata)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error


@contextlib.contextmanager
def _with_transformers() -> Iterator[None]:
    """Import transformers, one thread at a time, without its advice that models need PyTorch: here they do not."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    with _transformers:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
