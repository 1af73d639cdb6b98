"""Prompts are read from files and from standard input as they are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.entrypoints.encodings import encoding_of
from jaxllm.entrypoints.tables import BadRow, is_table, read_rows


def read_stdin() -> Iterator[str]:
    """Read one prompt a line, and leave out blank lines."""
    if sys.stdin.isatty():
        print("Reading prompts from the keyboard, one a line; Ctrl-D ends them.", file=sys.stderr)
        # the engine cannot work while it waits for somebody who types
        return iter(list(_lines(sys.stdin)))
    return _lines(sys.stdin)


def read_prompts(path: str, column: str | None, encoding: str | None = None) -> Iterator[Any]:
    """Return the prompts of a file, by its name's end.

    ``.csv`` and ``.parquet`` have them in `column` (default "prompt"). A line of ``.jsonl`` is a text, a list of token
    ids, or an object with ``prompt``, ``prompt_token_ids`` or ``messages``. Any other file has one prompt a line.

    Args:
        encoding: of a file that is no Parquet, as the user says; None: UTF-8.

    Raises:
        JaxLLMError: the file cannot be read.
        ValidationError: there is no such column, a line that is not JSON, or a number in place of a prompt; or the file
            is not in its encoding.
    """
    if is_table(path):
        name = column or "prompt"
        return _cells(path, name, encoding)
    if column:
        raise ValidationError(f"--prompt-column is for CSV and Parquet files, and the input is {path!r}.")
    return _file(Path(path), encoding)


def _cells(path: str, name: str, encoding: str | None) -> Iterator[Any]:
    for number, row in enumerate(read_rows(path, [name], encoding=encoding), start=1):
        if isinstance(row, BadRow):
            raise ValidationError(f"{path}, row {number}: {row}")
        yield _prompt(row[name], f"{path}, row {number}, column {name!r}")


def _prompt(value: Any, place: str) -> Any:
    """What is a prompt, or is refused alone. A number is neither: the first of several would be token ids."""
    if isinstance(value, int):
        raise ValidationError(f"{place}: a prompt must be text or a list of token ids, got the number {value}.")
    return value


def _file(path: Path, encoding: str | None) -> Iterator[Any]:
    is_jsonl = path.suffix.lower() in (".jsonl", ".json")
    try:
        # wrong bytes come as lone surrogates, with which a prompt is refused alone
        with open(path.expanduser(), encoding=encoding_of(str(path), encoding), errors="surrogateescape") as file:
            yield from _objects(path, file) if is_jsonl else _lines(file)
    except OSError as error:
        raise JaxLLMError(f"The input {str(path)!r} cannot be read: {error}") from error


def _lines(file: TextIO) -> Iterator[str]:
    return (line for line in (line.rstrip("\r\n") for line in file) if line.strip())


def _objects(path: Path, file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValidationError(f"{path}, line {number}: not JSON: {error}") from error
            yield _prompt(value, f"{path}, line {number}")
