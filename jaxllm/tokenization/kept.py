"""Tokenizers of folders as transformers made them, kept for starts that need not import it then.

What transformers makes of a folder's files depends on all of them and on its version, and is a tokenizer of the
tokenizers library. That is kept under a hash of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.tokenization.engine_tokenizer import EngineTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: how a file begins; the SHA-256 of what follows comes next
_MAGIC = b"jaxllm tokenizer 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
#: of files that have no part in a tokenizer: weights
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"))
#: of a file that is read as a whole to know it; no tokenizer's is larger
_MOST_BYTES = 2**26
#: what of transformers' class decides how ids and texts follow from the backend
_METHODS = ("encode", "decode", "_decode", "_encode_plus", "backend_tokenizer")


class KeptTokenizer:
    """The place of a folder's tokenizer among those that are kept.

    Args:
        mode: of `load_tokenizer`.
        kept: the folder that has them; None: nothing is kept.
    """

    def __init__(self, folder: Path, mode: str, kept: Path | None):
        self._path: Path | None = None
        if kept is not None:
            with contextlib.suppress(OSError):  # a file that cannot be read, and may have no part in it
                self._path = kept / f"{_identity(folder, mode)}.tokenizer"

    def find(self, make: Callable[[], PreTrainedTokenizerBase]) -> EngineTokenizer | None:
        """The tokenizer, where it was kept; `make` loads transformers' one."""
        content = None if self._path is None else _read(self._path)
        if content is None:
            return None
        from tokenizers import Tokenizer

        facts, backend = content.split(b"\n", 1)
        try:
            return EngineTokenizer(Tokenizer.from_buffer(backend), json.loads(facts)["eos_token_id"], make)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception; it can be made anew
            logger.warning("The kept tokenizer %s cannot be read and is made anew: %s", self._path, error)
            return None

    def keep(self, tokenizer: Any) -> None:
        """Keep transformers' one, where its backend is all that texts and ids follow from."""
        if self._path is not None and _is_plain(tokenizer):
            try:
                content = tokenizer.backend_tokenizer.to_str()
            except Exception as error:  # noqa: BLE001 - parts of it may be written in Python
                logger.debug("The tokenizer cannot be kept: %s", error)
                return
            facts = json.dumps({"eos_token_id": tokenizer.eos_token_id})
            _write(self._path, f"{facts}\n{content}".encode())


def _is_plain(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend: Any = tokenizer.backend_tokenizer
    own = any(getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name) for name in _METHODS)
    # what a backend does not write down, and what is done to texts besides
    return not (own or backend.encode_special_tokens or tokenizer.clean_up_tokenization_spaces)


def _identity(folder: Path, mode: str) -> str:
    digest = hashlib.sha256(_MAGIC + mode.encode())
    for package in ("transformers", "tokenizers"):
        digest.update(f"\0{importlib.metadata.version(package)}".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS or not file.is_file():
            continue
        status = file.stat()
        large = status.st_size > _MOST_BYTES
        content = f"{status.st_size} {status.st_mtime_ns}".encode() if large else file.read_bytes()
        digest.update(f"\0{file.name}\0".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """What `_write` wrote; None: nothing that is whole."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    content = stored[start:]
    return content if stored[:start] == _MAGIC + hashlib.sha256(content).digest() else None


def _write(path: Path, content: bytes) -> None:
    """Keep a file, whole or not at all; where that fails, the next start makes it again."""
    new = path.with_name(f".new-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)
            os.replace(new, path)
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
    except OSError as error:
        logger.debug("The tokenizer cannot be kept in %s: %s", path.parent, error)
