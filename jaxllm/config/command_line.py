"""The engine's arguments as options of a command line, in kebab-case."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config import argument_checks
from jaxllm.config.arguments import ALIASES, NEVER, NO_EFFECT, NOT_YET
from jaxllm.config.engine_args import EngineArgs


def count(text: str) -> int:
    """A whole number; as in vLLM, 1k is 1000 and 1K is 1024 (likewise m, g), and 25.6k is 25600."""
    try:
        return argument_checks.count("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1000, 1k and 25.6k are)") from None


def size(text: str) -> int:
    """Bytes, as `argument_checks.size` reads them."""
    try:
        return argument_checks.size("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes (4294967296, 4GiB and 500MB are)"
        ) from None


def _length(text: str) -> int | str:
    return "auto" if text.strip().lower() == "auto" else count(text)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"rope_theta\": 10000}}'")
    return value


def _value(text: str) -> Any:
    """For vLLM's arguments without a type here: JSON where it is JSON, text elsewhere."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser that takes ``--max_num_seqs`` for ``--max-num-seqs``, as vLLM's does."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(with_hyphens(sys.argv[1:] if args is None else args), namespace)


def add_engine_arguments(parser: argparse._ActionsContainer, *, defaults: bool = False) -> None:
    """Add the engine's arguments, except the model: what each is, its field says (`jaxllm.config.argument`).

    vLLM's other arguments are taken as well, without being listed: the engine says what becomes of them.

    Args:
        defaults: whether an argument that is not given has its default; otherwise it is not there at all.
    """
    group = parser.add_argument_group("engine options")
    readers = engine_types()
    for field in dataclasses.fields(EngineArgs):
        if field.name in readers:
            default = field.default if defaults and field.default is not dataclasses.MISSING else argparse.SUPPRESS
            text = field.metadata["help"] or argparse.SUPPRESS
            add_option(group, field.name, readers[field.name], text, default=default, short=field.metadata["short"])
    for name, values in unlisted().items():
        kind = None if values and all(isinstance(value, bool) for value in values) else _value
        add_option(group, name, kind, argparse.SUPPRESS)


def engine_types() -> dict[str, Callable[[str], Any] | None]:
    """Engine argument -> what reads its text; None: a switch. `model` is an option of its own."""
    readers: dict[type, Callable[[str], Any]] = {int: count, float: float, dict: _mapping, str: str, os.PathLike: str}
    found: dict[str, Callable[[str], Any] | None] = {}
    for name, hint in typing.get_type_hints(EngineArgs).items():
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        kinds = [typing.get_origin(member) or member for member in members if member is not type(None)]
        if kinds == [bool]:
            found[name] = None
        else:
            # a type that says more than text is tried first; JSON is for what is neither
            found[name] = next((reader for kind, reader in readers.items() if kind in kinds), _value)
    del found["model"]
    found["max_model_len"] = _length
    found["kv_cache_memory_bytes"] = size
    return found


def unlisted() -> dict[str, tuple[Any, ...]]:
    """vLLM's arguments that are no fields of `EngineArgs` -> values that ask for nothing, which tell their type."""
    found = {name: values for names in NOT_YET.values() for name, values in names.items()}
    found.update({name: never.accepted for name, never in NEVER.items()})
    found.update({name: no_effect.quiet for name, no_effect in NO_EFFECT.items()})
    found.update(dict.fromkeys(ALIASES, (1,)))
    return found


def add_option(
    group: argparse._ArgumentGroup,
    name: str,
    kind: Any,
    text: str,
    *,
    default: Any = argparse.SUPPRESS,
    short: str | None = None,
) -> None:
    flags = [*([short] if short else []), f"--{name.replace('_', '-')}"]
    if kind is None:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=text, dest=name)
        return
    shown = "" if default is argparse.SUPPRESS else f" (default: {default})"
    metavar = "JSON" if kind is _mapping else "TEXT" if kind is str else "N"
    help_text = text if text is argparse.SUPPRESS else text + shown
    group.add_argument(*flags, type=kind, default=default, help=help_text, metavar=metavar, dest=name)


def with_hyphens(argv: Sequence[str]) -> list[str]:
    """`argv` with ``--max_num_seqs`` spelled ``--max-num-seqs``, as vLLM takes both; values keep their underscores."""
    words = []
    for position, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[position:]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        words.append(word)
    return words
