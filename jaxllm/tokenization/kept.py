"""Tokenizers of folders as transformers made them, kept for starts that need not import it then.

What transformers makes of a folder's files depends on all of them and on its version, and is a tokenizer of the
tokenizers library. That is kept under a hash of both.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.tokenization.engine_tokenizer import EngineTokenizer
from jaxllm.weights.errors import WeightsError
from pallas_kernels import kept_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: how a file begins
_MAGIC = b"jaxllm tokenizer 1\n"
#: of files that have no part in a tokenizer: weights
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"))
#: of a file that is read as a whole to know it; no tokenizer's is larger
_MOST_BYTES = 2**26
#: the backend's own file, which is made of the kept one
_BACKEND = "tokenizer.json"
#: conversations' further templates, which have no part in what is kept
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
#: settings and templates, which decide without an error where they are missing
_SETTINGS = (
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
#: other files that are worth having in memory: of so many bytes, since what larger ones say of the vocabulary the
#: backend says, too, and of these kinds
_SMALL, _READ = 2**18, (".json", ".jinja", ".txt", ".model")
#: what of transformers' class decides how ids and texts follow from the backend
_METHODS = ("encode", "decode", "_decode", "_encode_plus", "backend_tokenizer")


class KeptTokenizer:
    """The place of a folder's tokenizer among those that are kept.

    Args:
        mode: of `load_tokenizer`.
        kept: the folder that has them; None: nothing is kept.
    """

    def __init__(self, folder: Path, mode: str, kept: Path | None):
        self._folder, self._mode, self._identity = folder, mode, ""
        self._path: Path | None = None
        self._small: dict[str, bytes] = {}
        if kept is not None:
            with contextlib.suppress(OSError):  # a file that cannot be read, and may have no part in it
                self._identity, self._small = _facts(folder, mode)
                self._path = kept / f"{self._identity}.tokenizer"

    def find(self, make: Callable[[Path], PreTrainedTokenizerBase]) -> EngineTokenizer | None:
        """The tokenizer, where it was kept; `make` loads transformers' one from a folder, which need not be there any
        more: it has what a conversation needs.
        """
        content = None if self._path is None else _read(self._path)
        if content is None:
            return None
        from tokenizers import Tokenizer

        facts, backend = content.split(b"\n", 1)
        try:
            tokenizer = Tokenizer.from_buffer(backend)
            made = functools.partial(self._made, tokenizer, make)
            return EngineTokenizer(tokenizer, json.loads(facts)["eos_token_id"], made)
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

    def _made(self, backend: Tokenizer, make: Callable[[Path], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
        """Transformers' tokenizer of the folder; where that has changed since the start, or gone, of what was there.
        Raises WeightsError where that makes another one.
        """
        why = "Files of it are others now."
        if self._is_unchanged():
            try:
                return make(self._folder)
            except WeightsError as error:
                why = str(error)
        with tempfile.TemporaryDirectory(prefix="jaxllm-tokenizer-") as place:
            for name, content in {**self._small, _BACKEND: backend.to_str().encode()}.items():
                (Path(place) / name).parent.mkdir(exist_ok=True)
                (Path(place) / name).write_bytes(content)
            for folder in (Path(place), self._folder):
                with contextlib.suppress(WeightsError):
                    found: Any = make(folder)
                    if _is_plain(found) and _described(found.backend_tokenizer) == _described(backend):
                        found.name_or_path = str(self._folder)
                        return found
        raise WeightsError(
            f"{self._folder} has changed since the engine started, and its tokenizer's files are read when the first "
            "conversation, or get_tokenizer(), needs them. Put them back; or call llm.get_tokenizer() before they go, "
            f"after which they are not needed any more. {why}"
        )

    def _is_unchanged(self) -> bool:
        with contextlib.suppress(OSError):
            return _facts(self._folder, self._mode)[0] == self._identity
        return False


def _described(backend: Tokenizer) -> Any:
    return json.loads(backend.to_str())


def _is_plain(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend: Any = tokenizer.backend_tokenizer
    own = any(getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name) for name in _METHODS)
    # what a backend does not write down, and what is done to texts besides
    return not (own or backend.encode_special_tokens or tokenizer.clean_up_tokenization_spaces)


def _facts(folder: Path, mode: str) -> tuple[str, dict[str, bytes]]:
    """What tells a folder's tokenizer from all others, and the files beside it that transformers may read."""
    digest, small = hashlib.sha256(_MAGIC + mode.encode()), {}
    for package in ("transformers", "tokenizers"):
        digest.update(f"\0{importlib.metadata.version(package)}".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS or not file.is_file():
            continue
        status = file.stat()
        large = status.st_size > _MOST_BYTES
        content = f"{status.st_size} {status.st_mtime_ns}".encode() if large else file.read_bytes()
        digest.update(f"\0{file.name}\0".encode() + hashlib.sha256(content).digest())
        if large or file.name == _BACKEND or file.name.endswith(".index.json"):
            continue
        if file.name in _SETTINGS or (len(content) <= _SMALL and file.suffix in _READ):
            small[file.name] = content
    for file in folder.glob(_MORE_TEMPLATES):
        small[str(file.relative_to(folder))] = file.read_bytes()
    return digest.hexdigest(), small


def _read(path: Path) -> bytes | None:
    """What `_write` wrote; None: nothing that is whole."""
    with contextlib.suppress(OSError):
        return kept_files.read(path, magic=_MAGIC)
    return None


def _write(path: Path, content: bytes) -> None:
    """Keep a file; where that fails, the next start makes it again."""
    try:
        kept_files.write(path, content, magic=_MAGIC)
    except OSError as error:
        logger.debug("The tokenizer cannot be kept in %s: %s", path.parent, error)
