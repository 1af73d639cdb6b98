"""The file of results is appended line by line, and taken up again after whatever ended the run before.

A line is written by one call of the operating system, as soon as its request has finished. The process may therefore be
killed at any time: what it wrote is with the operating system, and the most that is left of the line in the making is
a piece without a newline, which the next run cuts off. The machine may go down as well: the file is forced to the disk
every five seconds and at the end, so that at most the results of the last five seconds have to be computed again. (A
sync for every line would cost more than the line does.)
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.entrypoints.batch.digests import DigestSet

_SYNC_SECONDS = 5.0
_ID = "batch_req_"
#: errors of lines that have no custom_id of their own: these are known by their line number
_BEGINNING = b'{"id": "batch_req_'
INVALID_LINE, DUPLICATE = "invalid_line", "duplicate_custom_id"


class Journal:
    """Writes results, and knows those of earlier runs.

    Args:
        path: the file; "-": standard output.
        resume: go on with the file; what it holds is kept, except a torn last line.
        overwrite: begin anew, whatever it holds.

    Raises:
        ValidationError: the file exists and neither was asked for, or it is no file of results.
        JaxLLMError: it cannot be opened, or another process is writing it.
    """

    def __init__(self, path: str, *, resume: bool = False, overwrite: bool = False):
        if resume and overwrite:
            raise ValidationError("Give --resume or --overwrite, not both.")
        self.path = path
        #: lines that earlier runs finished, and those of them that failed
        self.num_finished = self.num_failed = 0
        self._ids = DigestSet()
        self._numbers = DigestSet()
        self._lock = threading.Lock()
        place = Path(path).expanduser()
        #: what can be cut off, read again and forced to a disk; not standard output, a pipe or /dev/null
        self._is_file = path != "-" and (place.is_file() or not place.exists())
        if resume and not self._is_file:
            raise ValidationError(f"--resume needs an output file; {path!r} cannot be read again.")
        if self._is_file and place.exists() and place.stat().st_size and not (resume or overwrite):
            raise ValidationError(
                f"The output {path!r} exists. --resume finishes what it lacks, --overwrite begins anew."
            )
        self._file = _open(path, place, self._is_file)
        try:
            if self._is_file:
                self._lock_file()
            if resume:
                self._take_up()
            elif self._is_file:
                self._file.truncate(0)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def is_finished(self, custom_id: str) -> bool:
        """Return whether an earlier run has the result of this line."""
        return custom_id in self._ids

    def is_refused(self, number: int) -> bool:
        """Return whether an earlier run has the error of this line, which has no custom_id of its own."""
        return str(number) in self._numbers

    def write(self, number: int, record: dict[str, Any]) -> None:
        """Append one result, whole. Raises JaxLLMError when that fails: the disk may be full.

        Args:
            number: of the line in the input; its result's id.
            record: custom_id, response and error.
        """
        record = {"id": f"{_ID}{number}", **record}
        try:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # lone surrogates, which JSON can escape and UTF-8 cannot hold
            line = json.dumps(record).encode() + b"\n"
        with self._lock:
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                if self._is_file and time.monotonic() - self._synced > _SYNC_SECONDS:
                    self._sync()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise JaxLLMError(f"The output {self.path!r} could not be written: {error.strerror}.") from error

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _lock_file(self) -> None:
        """Keep a second process from writing the same file: one that was thought dead may still run."""
        try:
            import fcntl
        except ImportError:  # not on this platform
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JaxLLMError(f"Another process is writing {self.path!r}.") from error
        except OSError:  # some network file systems have no locks
            return

    def _take_up(self) -> None:
        """Learn what is finished, and cut off a torn last line."""
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for position, line in enumerate(lines, start=1):
                record = _record(line)
                if record is None:
                    # what was torn has no newline, and begins as every result does
                    if line.endswith(b"\n") or not _BEGINNING.startswith(line[: len(_BEGINNING)]):
                        raise ValidationError(
                            f"Line {position} of {self.path!r} is not a result of run-batch, so --resume cannot go on "
                            f"with it: {line[:80]!r}. Is it the right file?"
                        )
                    break
                self._learn(record)
                end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    def _learn(self, record: dict[str, Any]) -> None:
        error = record.get("error") or {}
        self.num_finished += 1
        self.num_failed += bool(error)
        custom_id = record["custom_id"]
        if custom_id is None or (isinstance(error, dict) and error.get("code") in (INVALID_LINE, DUPLICATE)):
            self._numbers.add(str(record["id"]).removeprefix(_ID))
        else:
            self._ids.add(custom_id)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._lock, self._file:
            if self._is_file:
                with contextlib.suppress(OSError):
                    self._sync()


def _open(path: str, place: Path, is_file: bool) -> BinaryIO:
    try:
        if path == "-":
            return os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        mode = "wb" if not is_file else "r+b" if place.exists() else "x+b"
        return open(place, mode, buffering=0)
    except OSError as error:
        raise JaxLLMError(f"The output {path!r} cannot be written: {error.strerror}.") from error


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the result in a line of output; None when it is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "id" not in record or "custom_id" not in record:
        return None
    return record if isinstance(record["custom_id"], str | None) else None
