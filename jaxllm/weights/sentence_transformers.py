"""What a sentence-transformers directory says beside the model's own files (https://sbert.net)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import DenseModule
from jaxllm.weights.checkpoint import read_json

#: what is read here, relative to the model's directory
MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
_POOLING_MODES = {
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_lasttoken": "LAST",
    # newer files name one
    "cls": "CLS",
    "mean": "MEAN",
    "lasttoken": "LAST",
}


#: torch's activation modules by their class's name
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh"}
#: fields of a Dense module whose other values give other vectors: PyLate's adds its input, others take a token's
_OF_DENSE = {"use_residual": False, "module_input_name": "sentence_embedding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceTransformersConfig:
    """How the model's authors pool, and how long its inputs were."""

    #: "CLS", "LAST" or "MEAN"; None: no pooling module
    pooling_type: str | None
    #: whether embeddings are normalised
    normalize: bool
    max_seq_length: int | None
    do_lower_case: bool
    #: layers behind pooling, whose weights lie in folders of their own
    dense_modules: tuple[DenseModule, ...]
    #: files to keep with the model, relative to its directory
    files: tuple[str, ...]


def sentence_transformers_config(directory: Path) -> SentenceTransformersConfig | None:
    """None when `directory` has no modules.json.

    Raises:
        ValidationError: a module or a way of pooling that is not supported; leaving it out would give other vectors.
        WeightsError: a file is not readable.
    """
    modules: Any = read_json(directory / MODULES, list) if directory.is_dir() else None
    if modules is None:
        return None
    pooling_type, normalize, files = None, False, [MODULES]
    dense: list[DenseModule] = []
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            file = f"{module.get('path', '')}/config.json"
            pooling_type = _pooling_type(read_json(directory / file) or {}, file)
            files.append(file)
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense":
            if pooling_type is None or normalize:
                raise ValidationError(
                    f"{directory / MODULES} has a Dense module in front of Pooling or behind Normalize, which is not "
                    "supported: it is computed between these."
                )
            file = f"{module.get('path', '')}/config.json"
            dense.append(_dense_module(str(module.get("path", "")), read_json(directory / file) or {}, file))
            files.append(file)
        elif kind != "Transformer":
            raise ValidationError(
                f"{directory / MODULES} asks for a module {kind!r}, which is not supported; supported: Transformer, "
                "Pooling, Dense, Normalize."
            )
    transformer = read_json(directory / TRANSFORMER)
    if transformer is not None:
        files.append(TRANSFORMER)
    transformer = transformer or {}
    return SentenceTransformersConfig(
        pooling_type=pooling_type,
        normalize=normalize,
        max_seq_length=transformer.get("max_seq_length"),
        do_lower_case=bool(transformer.get("do_lower_case")),
        dense_modules=tuple(dense),
        files=tuple(files),
    )


def _dense_module(path: str, config: dict[str, Any], file: str) -> DenseModule:
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise ValidationError(f"{file} asks for the activation {activation!r}; supported: {', '.join(_ACTIVATIONS)}.")
    for name, only in _OF_DENSE.items():
        if config.get(name) not in (None, only):
            raise ValidationError(f"{file} asks for {name}={config[name]!r}, which is not supported; only {only!r} is.")
    if path in ("", "..") or Path(path).name != path:
        raise ValidationError(f"The path of a Dense module in {MODULES} must be a folder of the model's, got {path!r}.")
    sizes = {}
    for name in ("in_features", "out_features"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ValidationError(f"{name} of {file} must be a number of features, got {config.get(name)!r}.")
        sizes[name] = config[name]
    return DenseModule(path=path, bias=bool(config.get("bias", True)), activation=_ACTIVATIONS[activation], **sizes)


def _pooling_type(config: dict[str, Any], file: str) -> str:
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    found = [_POOLING_MODES.get(name) for name in modes]
    if len(found) != 1 or found[0] is None:
        raise ValidationError(
            f"{file} asks for the pooling {' + '.join(modes) or 'none'}; supported is one of "
            f"{', '.join(_POOLING_MODES)}."
        )
    return found[0]
