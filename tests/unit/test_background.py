"""Programs that are made beside steps, where not everything goes well."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from jaxllm.api.errors import JaxLLMError
from jaxllm.runner.compile.background import Background


class Lowered:
    def compile(self, compiler_options: dict[str, Any]) -> str:
        return threading.current_thread().name


class Late:
    """What `Background` asks of programs.

    Args:
        first: done before the first is made.
    """

    def __init__(self, first: Callable[[], object] = lambda: None):
        self.late: tuple[Any, ...] = ("one", "two")
        self.made: dict[Any, str] = {}
        self._first = first

    def name(self, key: Any) -> str:
        return key

    def compile_late(self, key: Any, beside: Callable[[Any], Any]) -> None:
        if not self.made:
            self._first()
        self.made[key] = beside(Lowered()).compile({})


def background(late: Any) -> Background:
    return Background(late)


def test_a_container_that_allows_no_priorities_gets_all_programs(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refused)
    late = Late()
    background(late).wait()
    assert list(late.made) == ["one", "two"]


def test_no_thread_begins_once_programs_are_made(monkeypatch: pytest.MonkeyPatch):
    """Python 3.12 refuses it where the interpreter ends, which waits for the program that is under way."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    late = Late(lambda: monkeypatch.setattr(threading.Thread, "start", refused))
    background(late).wait()
    assert list(late.made) == ["one", "two"]
    assert threading.current_thread().name not in late.made.values(), "another thread compiles"


def test_what_was_there_before_the_end_is_there():
    late = Late()
    made = background(late)
    made.wait()
    made.stop()
    made.wait()
    stopped = threading.Event()
    ended = background(Late(stopped.wait))
    ended.stop()
    stopped.set()
    with pytest.raises(JaxLLMError, match="was shut down before"):
        ended.wait()


def test_what_fails_is_shown_whole_at_debug_level(caplog: pytest.LogCaptureFixture):
    """The text of an error may be a key alone."""

    def fail() -> None:
        raise KeyError("Var(id=1)")

    caplog.set_level(logging.DEBUG, "jaxllm")
    with pytest.raises(JaxLLMError, match="2 programs were not compiled"):
        background(Late(fail)).wait()
    assert [record.levelname for record in caplog.records] == ["DEBUG", "WARNING"] * 2
    assert "in fail" in caplog.text


def test_what_fails_in_an_engine_that_was_shut_down_is_nobodys_concern(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "jaxllm")
    stopped = threading.Event()

    def fail() -> None:
        stopped.wait()
        raise KeyError("Var(id=1)")

    late = Late(fail)
    ended = background(late)
    ended.stop()
    stopped.set()
    with pytest.raises(JaxLLMError, match="was shut down before"):
        ended.wait()
    assert not caplog.records and not late.made
