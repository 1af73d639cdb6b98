"""What a start says while it lasts."""

from __future__ import annotations

import concurrent.futures
import io
import json
import logging
import sys
import threading
from pathlib import Path

import pytest
from support.read_only import read_only, temporary_folder

from jaxllm.engine.interrupt import StartInterrupt
from jaxllm.runner.compile.progress import LINE_INTERVAL, StartProgress
from jaxllm.startup.start_times import KEPT, StartTimes


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return texts


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxllm")


@pytest.mark.parametrize(
    ("missing", "expected", "text"),
    [
        (0, {}, "Loading 8 programs from the compile cache"),
        (
            0,
            {False: 4.2, True: 31.0},
            "Loading 8 programs from the compile cache; the last start like this one took 4 s",
        ),
        (3, {False: 4.2}, "Compiling 3 of 8 programs, and keeping them for the next start"),
        (
            8,
            {True: 31.0},
            "Compiling 8 of 8 programs, and keeping them for the next start; the last start like this one took 31 s",
        ),
        (None, {}, "Compiling 8 programs, or loading those that JAX's compile cache has"),
    ],
)
def test_what_there_is_to_do_is_said_once(
    caplog: pytest.LogCaptureFixture, missing: int | None, expected: dict[bool, float], text: str
):
    progress = StartProgress(expected=expected)
    progress.begin(8, missing)
    progress.begin(8, 0)
    assert said(caplog) == [text]
    assert progress.compiles == (missing != 0)


def test_without_a_terminal_there_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture):
    now = 100.0
    progress = StartProgress(expected={True: 31.0}, clock=lambda: now)
    progress.begin(8, 8)
    said(caplog)
    for done in range(4):
        now = 100.0 + (LINE_INTERVAL + 1) * done / 2
        progress.programs(done, 8)
    assert said(caplog) == ["2 of 8 programs, 6 of about 31 s"]
    now = 140.0
    progress.programs(5, 8)
    assert said(caplog) == ["5 of 8 programs, 40 s"]


def test_a_terminal_shows_a_bar(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    progress = StartProgress(on_terminal=True, expected={True: 31.0})
    progress.begin(8, 8)
    progress.programs(3, 8)
    progress.close()
    assert "3 of 8 programs |" in terminal.getvalue() and "of about 31 s" in terminal.getvalue()
    assert len(said(caplog)) == 1
    progress.programs(4, 8)
    assert "4 of 8" not in terminal.getvalue()


def test_waiting_ends_where_the_start_is_not_wanted_any_more():
    ended = threading.Event()
    progress = StartProgress(quiet=True, interrupt=StartInterrupt(ended.is_set))
    done: concurrent.futures.Future[int] = concurrent.futures.Future()
    done.set_result(1)
    waiting = progress.wait([done, concurrent.futures.Future()], ended.set)
    assert next(waiting).result() == 1
    with pytest.raises(KeyboardInterrupt):
        next(waiting)


# Times of earlier starts.


def test_waiting_ends_where_something_else_fails_that_the_start_needs():
    """A tokenizer or weights that cannot be read are told of while programs are compiled."""
    progress, reading, compiled = StartProgress(), concurrent.futures.Future(), concurrent.futures.Future()
    progress.ends_with(reading)
    with pytest.raises(OSError, match="unreadable"):
        for _ in progress.wait([compiled], lambda: reading.set_exception(OSError("unreadable"))):
            pass
    progress.close()
    progress.check()


def test_times_are_kept_by_engine_and_by_what_was_done(tmp_path: Path):
    StartTimes(tmp_path, "one").keep(31.04, compiled=True)
    StartTimes(tmp_path, "one").keep(4.0, compiled=False)
    StartTimes(tmp_path, "two").keep(7.0, compiled=False)
    StartTimes(tmp_path, "one").keep(5.0, compiled=False)
    assert StartTimes(tmp_path, "one").read() == {True: 31.0, False: 5.0}
    assert StartTimes(tmp_path, "two").read() == {False: 7.0}
    assert StartTimes(tmp_path, "three").read() == {}


def test_the_file_does_not_grow_for_ever(tmp_path: Path):
    for number in range(KEPT + 2):
        StartTimes(tmp_path, f"{number}").keep(1.0, compiled=False)
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == KEPT
    assert not StartTimes(tmp_path, "1").read() and StartTimes(tmp_path, "2").read()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"', b"null", b'{"a": 1}'])
def test_a_file_that_is_something_else_is_written_anew(tmp_path: Path, content: bytes):
    (tmp_path / "start_times.json").write_bytes(content)
    times = StartTimes(tmp_path, "one")
    assert times.read() == {}
    times.keep(4.0, compiled=False)
    assert times.read() == {False: 4.0}


def test_entries_that_are_something_else_are_passed_over(tmp_path: Path):
    times = StartTimes(tmp_path, "one")
    times.keep(4.0, compiled=False)
    file = tmp_path / "start_times.json"
    for entry in ('"x"', "null", '{"loaded": "soon"}'):
        (name,) = json.loads(file.read_text())
        file.write_text(f'{{"{name}": {entry}}}')
        assert times.read() == {}
        times.keep(5.0, compiled=True)
        assert times.read() == {True: 5.0}


def test_a_folder_that_cannot_be_written_or_is_not_there_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with temporary_folder() as folder:
        times = StartTimes(folder, "one")
        times.keep(4.0, compiled=False)
        with read_only(folder):
            times.keep(5.0, compiled=False)
            assert times.read() == {False: 4.0}
        assert len(list(folder.iterdir())) == 1
    StartTimes(tmp_path / "nowhere", "one").keep(4.0, compiled=False)
    assert not said(caplog)
