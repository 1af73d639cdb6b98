"""Prompts are read from CSV and Parquet files (the latter through pyarrow), a piece at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.entrypoints.encodings import encoding_of

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".parquet")
#: rows of Parquet in memory at once
_ROWS = 1024
#: characters of a CSV field, at most: far beyond any context
_FIELD = 1 << 30


class BadRow(str):
    """Says why a line of a CSV file cannot be read as a row."""


def is_table(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def read_rows(
    path: str, wanted: Sequence[str], optional: Sequence[str] = (), *, encoding: str | None = None
) -> Iterator[dict[str, Any] | BadRow]:
    """Return the rows of a CSV (first line: names; all values are text) or Parquet file.

    A CSV file that is no UTF-8 is refused, unless its encoding is given: where that is UTF-8, wrong bytes come as lone
    surrogates, which no tokenizer takes, so that such a row is refused alone.

    Args:
        wanted: columns that must be there.
        optional: columns that are read where they are there.
        encoding: of a CSV file, as the user says.

    Raises:
        JaxLLMError: the file cannot be read, or it is Parquet and pyarrow is not installed.
        ValidationError: a column is missing, or there twice, or the encoding does not fit.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv":
        try:
            yield from _csv(place, encoding_of(path, encoding), tuple(wanted), tuple(optional))
        except (OSError, csv.Error) as error:
            raise JaxLLMError(f"The table {path!r} cannot be read: {error}") from error
        return
    if encoding is not None:
        raise ValidationError(f"--encoding is for text; {path!r} says its own.")
    try:
        import pyarrow
    except ImportError as error:
        raise JaxLLMError(
            f"Reading {path!r} needs pyarrow: {how_to_install('tables')}. Or write the prompts as JSONL."
        ) from error
    try:
        for batch in _parquet(place, tuple(wanted), tuple(optional)):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise JaxLLMError(f"The table {path!r} cannot be read: {error}") from error


def _csv(
    path: Path, encoding: str, wanted: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[dict[str, Any] | BadRow]:
    csv.field_size_limit(_FIELD)
    with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        names = next(reader, None)
        if names is None:  # an empty file has no rows
            return
        places = {name: names.index(name) for name in _columns(path, names, wanted, optional)}
        for row in reader:
            if len(row) == len(names):
                yield {name: row[place] for name, place in places.items()}
            elif row:
                yield BadRow(f"the row has {len(row)} values, and there are {len(names)} columns")


def _parquet(path: Path, wanted: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names, wanted, optional)
        yield from file.iter_batches(batch_size=_ROWS, columns=columns)


def _columns(path: Path, there: list[str], wanted: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValidationError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(there)}.")
    twice = [name for name in (*wanted, *optional) if there.count(name) > 1]
    if twice:
        raise ValidationError(f"{path} has the column {twice[0]!r} {there.count(twice[0])} times; rename one.")
    return [*wanted, *(name for name in optional if name in there and name not in wanted)]


def as_messages(value: Any) -> Any:
    """Return a conversation from a cell: a list of structs (Parquet), or its JSON (CSV).

    Fields that only other messages have come as None and are left out. What is none is returned as it is, for the
    request to be refused with.
    """
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if not isinstance(value, list):
        return value
    return [
        {key: field for key, field in message.items() if field is not None} if isinstance(message, dict) else message
        for message in value
    ]
