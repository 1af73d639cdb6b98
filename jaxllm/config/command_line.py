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

from jaxllm.config import argument_checks
from jaxllm.config.argument import GROUPS
from jaxllm.config.arguments import ALIASES, NEVER, NO_EFFECT, NOT_YET
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.option_values import count, devices, gibibytes, json_object, number, seconds, size
from jaxllm.config.speculative import ENGINE_ARGUMENTS


def _length(text: str) -> int | str:
    return "auto" if text.strip().lower() == "auto" else count(text)


def _value(text: str) -> Any:
    """For vLLM's arguments without a type here: JSON where it is JSON, text elsewhere."""
    try:
        return json.loads(text)
    except ValueError:
        return text


#: what reads an option's text -> what the text looks like, in ``--help``
_FORMS: dict[Any, str] = {
    count: "N",
    devices: "N",
    int: "N",
    number: "X",
    seconds: "X",
    json_object: "JSON",
    str: "TEXT",
    _value: "VALUE",
}


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
    readers, fields = engine_types(), dataclasses.fields(EngineArgs)
    for name in GROUPS:
        group = parser.add_argument_group(f"{name} options")
        for field in fields:
            if field.name in readers and field.metadata["group"] == name:
                about = field.metadata
                default = {} if field.default is dataclasses.MISSING else field.default
                add_option(
                    group,
                    field.name,
                    readers[field.name],
                    about["help"],
                    default=field.default if defaults and default != {} else argparse.SUPPRESS,
                    shown=default,
                    form=about["form"] or _choices(about["check"]),
                    short=about["short"],
                )
    for name, values in unlisted().items():
        kind = None if values and all(isinstance(value, bool) for value in values) else _value
        add_option(parser, name, kind, None, short="-O" if name == "optimization_level" else None)


def engine_types() -> dict[str, Callable[[str], Any] | None]:
    """Engine argument -> what reads its text; None: a switch. `model` is an option of its own."""
    readers: dict[type, Callable[[str], Any]] = {int: count, float: number, dict: json_object, str: str}
    readers[os.PathLike] = str
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
    found["kv_offloading_size"] = found["cpu_offload_gb"] = gibibytes
    found.update({name: devices for name in found if name.endswith("_parallel_size")})
    return found


def unlisted() -> dict[str, tuple[Any, ...]]:
    """vLLM's arguments that are no fields of `EngineArgs` -> values that ask for nothing, which tell their type."""
    found = {name: values for names in NOT_YET.values() for name, values in names.items()}
    found.update({name: never.accepted for name, never in NEVER.items()})
    found.update({name: no_effect.quiet for name, no_effect in NO_EFFECT.items()})
    found.update(dict.fromkeys((*ALIASES, *ENGINE_ARGUMENTS), (1,)))
    return found


def add_option(
    group: argparse._ActionsContainer,
    name: str,
    kind: Any,
    text: str | None,
    *,
    default: Any = argparse.SUPPRESS,
    shown: Any = None,
    form: str | None = None,
    short: str | None = None,
) -> None:
    """Add the option of an argument.

    Args:
        name: with underscores.
        kind: what reads its text; None: a switch with a ``--no-`` form.
        text: its line of ``--help``; None: it is not listed.
        default: what the parsed arguments have where it is not given; SUPPRESS: nothing.
        shown: the default that ``--help`` tells; None: `text` does.
        form: what its value looks like; None: as `kind` reads it.
        short: a short form of the option.
    """
    flags = [*([short] if short else []), f"--{name.replace('_', '-')}"]
    help_text = argparse.SUPPRESS if text is None else text if shown is None else f"{text} (default: {_plain(shown)})"
    if kind is None:
        action = group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, dest=name)
    else:
        metavar = form or _FORMS.get(kind, "VALUE")
        action = group.add_argument(*flags, type=kind, default=default, metavar=metavar, dest=name)
    # some versions of argparse add the default to a switch's help by themselves
    action.help = help_text


def _choices(check: Any) -> str | None:
    return f"{{{','.join(check.choices)}}}" if isinstance(check, argument_checks.OneOf) else None


def _plain(default: Any) -> str:
    return "none" if default in ("", (), {}) else str(default)


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
