"""A command line that is wrong gets one line: what is wrong with it, and what was perhaps meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

#: letters of an option from which on its beginning tells what was meant
_TELLING = len("--max")
_MOST_SUGGESTIONS = 3


class CommandParser(argparse.ArgumentParser):
    """The parser of ``jaxllm``, and those of its commands, which `add_subparsers` makes of the same class.

    Usage is one line, however many options there are; ``--help`` lists them.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse all of `args`: what is not known ends the process with status 2."""
        words = list(sys.argv[1:] if args is None else args)
        commands = self._commands()
        if commands is None:
            self._check_options(words)
        else:
            self._check_command(words, list(commands.choices))
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            options = [word for word in rest if word.startswith("-")]
            self.error(f"there is no option {options[0]}" if options else f"there is no place for {rest[0]!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")

    def format_help(self) -> str:
        if self.usage is None:
            self.usage = " ".join(["%(prog)s", "[options]", *_required(self._actions)])
        action = self._commands()
        if action is None:
            return super().format_help()
        # argparse breaks the lines of commands with long names
        commands = [(each.dest, each.help or "") for each in action._get_subactions()]
        options = [(", ".join(each.option_strings), each.help or "") for each in self._actions if each.option_strings]
        parts = [self.format_usage(), f"{self.description}\n", _rows("commands", commands), _rows("options", options)]
        return "\n".join([*parts, *([f"{self.epilog}\n"] if self.epilog else [])])

    def _commands(self) -> argparse._SubParsersAction | None:
        """Where one command of several has to be named; None: this is one."""
        found = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return next(found, None)

    def _check_options(self, words: Iterable[str]) -> None:
        """Argparse would take the value of an unknown option for something else, and complain about that."""
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            option = word.partition("=")[0]
            if word.startswith("--") and " " not in word and word not in known and option not in known:
                off = option.startswith("--no-")
                listed = [
                    name
                    for name, action in known.items()
                    if action.help != argparse.SUPPRESS and name.startswith("--no-") == off
                ]
                self.error(f"there is no option {option}{_meant(option, listed)}")

    def _check_command(self, words: Sequence[str], commands: list[str]) -> None:
        if not words:
            self.print_help(sys.stderr)
            self.exit(2)
        word = words[0]
        if word in commands or word in self._option_string_actions:
            return
        if word.startswith("-"):
            self.error(f"{word.partition('=')[0]} is in front of the command: options follow it")
        meant = _meant(word, commands) or f"; there are {', '.join(commands)}"
        self.error(f"there is no command {word!r}{meant}")


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "".join([f"{title}:\n", *(f"  {name:<{width}}{text}\n" for name, text in rows)])


def _required(actions: Iterable[argparse.Action]) -> list[str]:
    """What a command does not run without, and its positional arguments, as a usage line shows them."""
    options, others = [], []
    for action in actions:
        name = str(action.metavar or action.dest.upper())
        if action.option_strings:
            options += [f"{action.option_strings[0]} {name}"] if action.required else []
        elif isinstance(action, argparse._SubParsersAction):
            others.append(f"{name} ...")
        else:
            more = f"{name} ..." if action.nargs in ("*", "+") else name
            others.append(f"[{more}]" if action.nargs in ("?", "*") else more)
    return [*options, *others]


def _meant(word: str, known: Sequence[str]) -> str:
    """A question that names what is close to `word`; empty where nothing is."""
    close = [name for name in known if name.startswith(word)] if len(word) >= _TELLING else []
    if not 0 < len(close) <= _MOST_SUGGESTIONS:
        close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {' or '.join(close)}?" if close else ""
