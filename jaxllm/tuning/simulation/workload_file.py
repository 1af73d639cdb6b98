"""Workloads are read from files: traces of jaxllm, and lines of JSON with lengths and arrival times.

A line is a request:

- ``input_length`` and ``output_length``, in tokens. ``prompt_tokens`` and ``output_tokens`` are the same; in place of
  the first, ``prompt`` may have the token ids.
- ``timestamp``, when it comes. Mooncake's traces have it in milliseconds, Alibaba's in seconds: where nobody says,
  whole numbers are milliseconds. ``arrival_s`` has seconds. All lines have one of them, or none has, and all come
  at once.
- ``hash_ids``, of the pieces of the prompt, whose size is found in the lengths: equal ones have the same tokens.

Fields of other names are passed over, and a file may be packed by gzip. Mooncake:
https://github.com/kvcache-ai/Mooncake (FAST25-release/traces).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.tuning.simulation.workload import Workload, WorkloadRequest, piece_size_of
from jaxllm.tuning.trace_file import read_trace

#: in seconds
TIME_UNITS = {"s": 1.0, "ms": 1e-3}
#: of a time, in any unit; a whole number may be larger than any that a clock has
_LATEST = 1e18
#: what a packed file begins with
_GZIP = b"\x1f\x8b"
_PROMPT, _OUTPUT = ("input_length", "prompt_tokens"), ("output_length", "output_tokens")
_EXPECTED = 'expected {"input_length": N, "output_length": N}, with "timestamp" or "arrival_s" and "hash_ids" if wanted'


def read_workload(
    path: Path, *, time_unit: str | None = None, piece_size: int | None = None, count: int | None = None
) -> Workload:
    """The workload of a file.

    Args:
        path: a trace that ``trace.save(PATH)`` wrote, or lines of JSON.
        time_unit: of "timestamp", "s" or "ms"; None: as the module says.
        piece_size: tokens that each of "hash_ids" stands for; None: what the lengths tell.
        count: requests at most, the first ones; None: all.

    Raises:
        ValidationError: the file cannot be read, or is neither.
    """
    if path.suffix == ".json":
        try:
            trace = read_trace(path)
        except ValidationError as error:
            raise ValidationError(f"{error} Lines of JSON are in a file of another name, such as x.jsonl.") from None
        found = Workload.of_trace(trace, source=path.name)
        return found if count is None else dataclasses.replace(found, requests=found.requests[:count])
    rows = list(_rows(path, count))
    lengths = [(_length(path, number, row, _PROMPT), _length(path, number, row, _OUTPUT)) for number, row in rows]
    times = [_time(path, number, row) for number, row in rows]
    _check_all_timed(path, rows)
    stamps = [time for time, is_stamp in times if is_stamp]
    whole = all(float(stamp).is_integer() for stamp in stamps)
    factor = TIME_UNITS[time_unit or ("ms" if whole else "s")] if stamps else 1.0
    first = min((time for time, _ in times), default=0.0)
    pieces = [_piece_ids(path, number, row) for number, row in rows]
    if all(isinstance(row.get("prompt"), list) for _, row in rows):
        prompts = [row["prompt"] for _, row in rows]
        arrivals = (factor * (time - first) for time, _ in times)
        return Workload.of_prompts(prompts, (output for _, output in lengths), arrivals, source=path.name)
    if any(pieces) and piece_size is None:
        named = [(prompt, len(ids)) for (prompt, _), ids in zip(lengths, pieces, strict=True) if ids]
        piece_size = piece_size_of(*zip(*named, strict=True))
        if piece_size is None:
            raise ValidationError(
                f'{path}: the numbers of "hash_ids" fit no usual size of a piece. Say how many tokens each stands for '
                "(--hash-block-size)."
            )
    requests = (
        WorkloadRequest(
            arrival=factor * (time - first), num_prompt_tokens=prompt, num_output_tokens=output, piece_ids=ids
        )
        for (prompt, output), (time, _), ids in zip(lengths, times, pieces, strict=True)
    )
    sizes = {} if piece_size is None else {"piece_size": piece_size}
    return Workload(requests=tuple(requests), source=path.name, **sizes)


def _rows(path: Path, count: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    number, found = 0, 0
    try:
        with path.open("rb") as file:
            is_packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path, "rt", encoding="utf-8-sig") if is_packed else path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValidationError(f"{path}, line {number}: {_EXPECTED}; got {line.strip()[:200]}")
                yield number, row
                found += 1
                if found == count:
                    return
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValidationError(f"{path} cannot be read: {reason}") from None
    except json.JSONDecodeError as error:
        raise ValidationError(f"{path}, line {number}, is not JSON: {error.msg}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path} cannot be read as lines of JSON, behind line {number}: {error}") from None


def _length(path: Path, number: int, row: dict[str, Any], names: tuple[str, ...]) -> int:
    value = next((row[name] for name in names if name in row), None)
    if value is None and names is _PROMPT and isinstance(row.get("prompt"), list):
        if not all(isinstance(token, int) for token in row["prompt"]):
            raise ValidationError(f'{path}, line {number}: "prompt" is a list of token ids; got {str(row)[:200]}')
        value = len(row["prompt"])
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValidationError(f"{path}, line {number}: {_EXPECTED} (whole numbers above 0); got {str(row)[:200]}")
    return value


def _time_name(row: dict[str, Any]) -> str | None:
    return next((name for name in ("arrival_s", "timestamp") if row.get(name) is not None), None)


def _check_all_timed(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> None:
    """Raise ValidationError where a line has no time, or one of another kind, and others have."""
    first = next(((number, name) for number, row in rows if (name := _time_name(row)) is not None), None)
    if first is None:
        return
    there, name = first
    lacking = [number for number, row in rows if _time_name(row) != name]
    if lacking:
        raise ValidationError(
            f'{path}, line {lacking[0]}: there is no "{name}", which line {there} has ({len(lacking)} of {len(rows)} '
            "lines have none). Give it to every line; or to none, and all come at once."
        )


def _time(path: Path, number: int, row: dict[str, Any]) -> tuple[float, bool]:
    """When a request comes, and whether that is a time stamp, whose unit is to be found out."""
    name = _time_name(row)
    value = 0.0 if name is None else row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LATEST:
        raise ValidationError(f'{path}, line {number}: "{name}" is a number; got {str(value)[:100]}')
    return value, name == "timestamp"


def _piece_ids(path: Path, number: int, row: dict[str, Any]) -> tuple[Any, ...]:
    ids = row.get("hash_ids") or ()
    if not isinstance(ids, list | tuple) or not all(isinstance(each, int | str) for each in ids):
        raise ValidationError(f'{path}, line {number}: "hash_ids" is a list of numbers or texts; got {str(ids)[:100]}')
    return tuple(ids)
