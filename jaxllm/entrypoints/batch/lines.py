"""The lines of a batch are read one after the other, and never held together."""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.entrypoints.batch.journal import INVALID_LINE
from jaxllm.entrypoints.encodings import encoding_of
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.tables import BadRow

#: a line of input: its number, from 1, and what it holds
NumberedLine = tuple[int, bytes | Mapping[str, Any] | BadRow]
_KEYS = ("custom_id", "method", "url", "body")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request of a batch, in OpenAI's format."""

    number: int
    custom_id: str
    url: str
    body: Any


def check_place(name: str, path: str) -> None:
    """Refuse what is neither a file nor standard input or output."""
    if "://" in path:
        raise ValidationError(f"{name} {path!r} is a URL, and jaxllm opens local files only: download it first.")


def read_lines(path: str, encoding: str | None = None) -> Iterator[NumberedLine]:
    """Return the lines of a JSONL file ("-": standard input), without blank ones.

    Args:
        encoding: as the user says; None: UTF-8, of which a line with wrong bytes is refused alone.

    Raises:
        JaxLLMError: the file cannot be read.
        ValidationError: the encoding is not the file's, or there is none, and the file is UTF-16.
    """
    try:
        file = sys.stdin.buffer if path == "-" else open(Path(path).expanduser(), "rb")
        decoded = None if encoding is None else encoding_of(path, encoding)
    except OSError as error:
        raise JaxLLMError(f"The input {path!r} cannot be read: {error.strerror}.") from error
    with file:
        lines: Iterator[bytes] = iter(file)
        if decoded is not None:
            text = io.TextIOWrapper(file, encoding=decoded, errors="surrogateescape", newline="\n")
            lines = (line.encode("utf-8", "surrogateescape") for line in text)
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValidationError(f"The input {path!r} is UTF-16: --encoding utf-16.")
            if line.strip():
                yield number, line


def count_lines(path: str) -> int | None:
    """Count the lines of a JSONL file; None stands for what cannot be read twice."""
    place = Path(path).expanduser()
    if path == "-" or not place.is_file():
        return None
    newlines, last = 0, b"\n"
    with open(place, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            newlines += piece.count(b"\n")
            last = piece[-1:]
    return newlines + (last != b"\n")


def parse_line(number: int, line: bytes | Mapping[str, Any] | BadRow) -> BatchLine:
    """Return the request in a line of input. Raises APIError, with the line's number in its message."""
    if isinstance(line, BadRow):
        raise _invalid(number, line)
    try:
        record = json.loads(line) if isinstance(line, bytes) else line
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise _invalid(number, f"it is not JSON: {reason}") from error
    if not isinstance(record, Mapping):
        raise _invalid(number, f"a line must be a JSON object, got {record!r:.80}")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _invalid(number, f"custom_id must be a non-empty string, got {custom_id!r:.80}")
    unknown = [key for key in record if key not in _KEYS]
    if unknown:
        raise LineError(number, custom_id, f"it has the key {unknown[0]!r:.80}; the keys are {', '.join(_KEYS)}")
    if record.get("method") != "POST":
        raise LineError(number, custom_id, f"method must be POST, got {record.get('method')!r:.80}")
    if not isinstance(record.get("url"), str):
        raise LineError(number, custom_id, f"url must be a string, got {record.get('url')!r:.80}")
    return BatchLine(number=number, custom_id=custom_id, url=record["url"], body=record.get("body"))


class LineError(APIError):
    """A line that is no request; its `custom_id` is None when it has none."""

    def __init__(self, number: int, custom_id: str | None, reason: str, *, code: str | None = None):
        super().__init__(f"line {number}: {reason}", code=code)
        self.custom_id = custom_id


def _invalid(number: int, reason: str) -> LineError:
    return LineError(number, None, reason, code=INVALID_LINE)


def same_file(first: str, second: str) -> bool:
    """Return whether two paths are one existing file."""
    paths = [os.path.expanduser(path) for path in (first, second)]
    return all(os.path.exists(path) for path in paths) and os.path.samefile(*paths)
