"""Prompts are read from files and from standard input as they are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.entrypoints.tables import BadRow, is_table, read_rows


def read_stdin() -> Iterator[str]:
    """Read one prompt a line, and leave out blank lines."""
    if sys.stdin.isatty():
        print("Reading prompts from the keyboard, one a line; Ctrl-D ends them.", file=sys.stderr)
        # the engine cannot work while it waits for somebody who types
        return iter(list(_lines(sys.stdin)))
    return _lines(sys.stdin)


def read_prompts(path: str, column: str | None) -> Iterator[Any]:
    """Return the prompts of a file, by its name's end.

    ``.csv`` and ``.parquet`` have them in `column` (default "prompt"). A line of ``.jsonl`` is a text, a list of token
    ids, or an object with ``prompt``, ``prompt_token_ids`` or ``messages``. Any other file has one prompt a line.

    Raises:
        JaxLLMError: the file cannot be read.
        ValidationError: there is no such column, or a line that is not JSON.
    """
    if is_table(path):
        name = column or "prompt"
        return _cells(path, name)
    if column:
        raise ValidationError(f"--prompt-column is for CSV and Parquet files, and the input is {path!r}.")
    return _file(Path(path))


def _cells(path: str, name: str) -> Iterator[Any]:
    for number, row in enumerate(read_rows(path, [name]), start=1):
        if isinstance(row, BadRow):
            raise ValidationError(f"{path}, row {number}: {row}")
        yield row[name]


def _file(path: Path) -> Iterator[Any]:
    is_jsonl = path.suffix.lower() in (".jsonl", ".json")
    try:
        with open(path.expanduser(), encoding="utf-8-sig") as file:
            yield from _objects(path, file) if is_jsonl else _lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise JaxLLMError(f"The input {str(path)!r} cannot be read: {error}") from error


def _lines(file: TextIO) -> Iterator[str]:
    return (line for line in (line.rstrip("\r\n") for line in file) if line.strip())


def _objects(path: Path, file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValidationError(f"{path}, line {number}: not JSON: {error}") from error
