"""Prompts from CSV and Parquet files, through pyarrow, a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import JaxLLMError, ValidationError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".parquet")
#: rows of Parquet in memory at once
_ROWS = 1024
#: bytes of CSV in memory at once; a row must fit in
_BLOCK = 16 << 20


def is_table(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def read_rows(path: str, wanted: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a CSV (first line: names; all values are text) or Parquet file.

    Args:
        wanted: columns that must be there.
        optional: columns that are read where they are there.

    Raises:
        JaxLLMError: pyarrow is not installed, or the file cannot be read.
        ValidationError: a column is missing.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise JaxLLMError(
            f"Reading {path!r} needs pyarrow: `pip install 'jaxllm[tables]'` (or write the prompts as JSONL)."
        ) from error
    place = Path(path).expanduser()
    batches = _csv if place.suffix.lower() == ".csv" else _parquet
    try:
        for batch in batches(place, tuple(wanted), tuple(optional)):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise JaxLLMError(f"The table {path!r} cannot be read: {error}") from error


def _csv(path: Path, wanted: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    from pyarrow import csv

    read, parse = csv.ReadOptions(block_size=_BLOCK), csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, read_options=read, parse_options=parse) as names:
        columns = _columns(path, names.schema.names, wanted, optional)
    # of no other type, however much the first rows look like numbers
    convert = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pyarrow.string()))
    with csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
        yield from reader


def _parquet(path: Path, wanted: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names, wanted, optional)
        yield from file.iter_batches(batch_size=_ROWS, columns=columns)


def _columns(path: Path, there: Sequence[str], wanted: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValidationError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(there)}.")
    return [*wanted, *(name for name in optional if name in there and name not in wanted)]


def as_messages(value: Any) -> Any:
    """A conversation from a cell: a list of structs (Parquet), or its JSON (CSV).

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
