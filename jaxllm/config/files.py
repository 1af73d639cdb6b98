"""Engine configurations lie in YAML files: those that come with jaxllm have names, the user's own have paths."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import all_names

_SUFFIXES = (".yaml", ".yml")


def load_config(path_or_name: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the engine arguments of a configuration: vLLM's names (hyphens or underscores) to values.

    Args:
        path_or_name: a YAML file, or the name of a shipped one ("throughput"; see `shipped_configs`).

    Raises:
        ValidationError: there is no such configuration, it is not a YAML mapping, or it has a key that is no engine
            argument. Values are checked by `EngineArgs`, together with what overrides them.
    """
    path = _find(path_or_name)
    arguments: dict[str, Any] = {}
    known = all_names()
    for key, value in _read(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name.lower(), sorted(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValidationError(f"{path}: {key!r} is not an engine argument.{hint}")
        if name in arguments:
            raise ValidationError(f"{path}: {name!r} is there twice, with hyphens and with underscores.")
        arguments[name] = value
    return arguments


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with jaxllm, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with `overrides` in place of its own arguments.

    Its `long_prefill_token_threshold` does not survive a `max_model_len` below it, where it would limit nothing.
    """
    arguments = {**config, **overrides}
    threshold, length = config.get("long_prefill_token_threshold"), overrides.get("max_model_len")
    if isinstance(threshold, int) and isinstance(length, int) and 0 < length < threshold:
        if "long_prefill_token_threshold" not in overrides:
            del arguments["long_prefill_token_threshold"]
    return arguments


def merged(path_or_name: str | os.PathLike[str], overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model and the other arguments of a configuration, with `overrides` in place of its own.

    Raises what `load_config` does, and ValidationError when neither names a model.
    """
    arguments = with_overrides(load_config(path_or_name), overrides)
    model = arguments.pop("model", None)
    if model is None:
        raise ValidationError(f"The configuration {os.fspath(path_or_name)!r} names no model: pass model=...")
    return model, arguments


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    text = os.fspath(path_or_name) if isinstance(path_or_name, str | os.PathLike) else ""
    if not isinstance(text, str) or not text.strip():
        raise ValidationError(f"A configuration is a YAML file or a shipped one's name; got {path_or_name!r}.")
    path = Path(text).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    name = text.lower().removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if os.sep in text or path.suffix.lower() in _SUFFIXES:
        raise ValidationError(f"The configuration file {text!r} does not exist (looked for {path.absolute()}).")
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValidationError(
        f"There is no configuration {text!r}.{hint} Give a YAML file, or one of: {', '.join(shipped) or 'none'}."
    )


def _folder() -> Path:
    """Where the shipped files are: inside an installed package, or beside it in a checkout."""
    package = Path(jaxllm.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _read(path: Path) -> Mapping[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML's own loader silently keeps the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        # a string, since messages about a stream would name it in their own way
        value = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValidationError(f"{path} is not a readable YAML file: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValidationError(f"{path}: expected engine arguments (name: value), found {type(value).__name__}.")
    return value
