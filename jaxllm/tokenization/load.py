"""There is one way to a tokenizer, whatever form the model comes in."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.tokenization.engine_tokenizer import EngineTokenizer
from jaxllm.tokenization.kept import KeptTokenizer
from jaxllm.weights.errors import WeightsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: a directory without any of these, and without tekken.json, has no tokenizer that transformers could build
_FILES = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*.tiktoken")
#: transformers imports its parts when they are asked for, and fails where two threads ask at once
_transformers = threading.Lock()


def load_tokenizer(path: str | os.PathLike[str], mode: str = "auto", **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a ``.gguf`` file, or of a local directory in Hugging Face's layout or Mistral's.

    Args:
        mode: "hf" reads Hugging Face's files, "mistral" Mistral's own (`tokenization.mistral`), "auto" the first ones
            where they exist, and "slow" as "auto".
        options: of ``AutoTokenizer.from_pretrained``, for Hugging Face's files.

    Nothing is fetched. Raises ``WeightsError`` when there is no such file or directory, when a GGUF file's tokenizer
    cannot be built, when the directory has none, or when transformers cannot load it; ``ValidationError`` for options
    of another tokenizer.
    """
    path = Path(path)
    if mode == "slow":
        logger.warning("tokenizer_mode='slow' has no effect: the tokenizers library makes the same tokens.")
    is_mistral = mode == "mistral" or (mode in ("auto", "slow") and _has_mistral_files_alone(path))
    if options and (is_mistral or path.is_file()):
        raise ValidationError(
            f"{path}: {', '.join(options)}: these are for a directory with Hugging Face's files, and this tokenizer is "
            "made of others. Leave them out."
        )
    if is_mistral:
        if not path.is_dir():
            raise WeightsError(f"{path}: tokenizer_mode='mistral' reads a directory with Mistral's own files")
        with _with_transformers():
            from jaxllm.tokenization.mistral import load_mistral_tokenizer

            return load_mistral_tokenizer(path)
    check_has_tokenizer(path)
    if path.is_dir():
        # with mistral_common installed, transformers would take Mistral's files
        given = {"mistral_format": False} if (path / "tekken.json").exists() else {}
        with _with_transformers():
            from huggingface_hub.errors import StrictDataclassError
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, **given, **options)
            except (OSError, ValueError, KeyError, StrictDataclassError) as error:
                # a missing key is all the text of its error
                why = f"there is no {error}" if isinstance(error, KeyError) else error
                raise WeightsError(
                    f"{path}: its tokenizer cannot be loaded: {why}. Put the model's own tokenizer files there; or "
                    "pass tokenizer=..., a folder, .gguf file or hub id that has them; or skip_tokenizer_init=True, "
                    "and prompts as token ids."
                ) from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # tokenizer.json may say both, from training; how long prompts are is the caller's to say
            backend.no_truncation()
            backend.no_padding()
        return tokenizer
    tokenizer, options = _of_gguf(path)
    with _with_transformers():
        from jaxllm.tokenization.gguf import Given, in_transformers

        return in_transformers(Given(tokenizer), options)


def load_engine_tokenizer(
    path: str | os.PathLike[str], mode: str = "auto", *, kept: Path | None = None
) -> PreTrainedTokenizerBase | EngineTokenizer:
    """As `load_tokenizer`, without importing transformers where it can: of a `.gguf` file, and of a folder whose
    tokenizer was kept.

    Args:
        kept: the folder of those that are kept; None: nothing is.
    """
    # wherever the process is when transformers' one is made
    path = Path(path).absolute()
    if mode not in ("auto", "hf") or not path.exists() or _has_mistral_files_alone(path):
        return load_tokenizer(path, mode)
    if path.is_dir():
        place = KeptTokenizer(path, mode, kept)
        found = place.find(functools.partial(load_tokenizer, mode=mode))
        if found is None:
            found = load_tokenizer(path, mode)
            with _with_transformers():
                place.keep(found)
        return found
    tokenizer, options = _of_gguf(path)
    end = options.get("eos_token")

    def make() -> PreTrainedTokenizerBase:
        with _with_transformers():
            from jaxllm.tokenization.gguf import in_transformers

            return in_transformers(tokenizer, options)

    return EngineTokenizer(tokenizer, None if end is None else tokenizer.token_to_id(end), make)


def _of_gguf(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """`described_tokenizer` of a file."""
    from jaxllm.tokenization.gguf import described_tokenizer
    from jaxllm.weights.formats.gguf import read_metadata

    if not path.exists():
        raise WeightsError(f"{path}: no such file or directory; a tokenizer comes from a .gguf file or a directory")
    metadata = read_metadata(path)
    try:
        return described_tokenizer(metadata)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def check_has_tokenizer(path: Path) -> None:
    """Raise WeightsError for a directory without a tokenizer's files, which is known long before one is loaded."""
    if path.is_dir() and not (path / "tekken.json").exists() and not _has_own_files(path):
        if _has_mistral_files_alone(path):
            return
        raise WeightsError(
            f"{path}: there is no tokenizer: tokenizer.json is missing, and so is any other form of one. Put the "
            "model's tokenizer.json there; or pass tokenizer=..., a folder, .gguf file or hub id that has one; or "
            "skip_tokenizer_init=True, and prompts as token ids."
        )


def _has_own_files(path: Path) -> bool:
    return any(found for pattern in _FILES for found in path.glob(pattern))


def _has_mistral_files_alone(path: Path) -> bool:
    if not path.is_dir() or _has_own_files(path):
        return False
    from jaxllm.tokenization.mistral import mistral_file

    return mistral_file(path) is not None


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
