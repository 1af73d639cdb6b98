"""Ctrl-C while an engine starts: the caller has it at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from support.live_buffers import live
from support.tiny_model import SMALL

from jaxllm import LLM, AsyncLLM
from jaxllm.weights.checkpoint import Checkpoint

PROGRAM = """
import signal, sys, threading
# a shell's background jobs ignore Ctrl-C, and so does what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
import jax
from support.tiny_model import SMALL
from jaxllm import LLM

def compile(*_, **__):
    print("compiling", flush=True)
    ended.wait()

ended = threading.Event()
jax.stages.Lowered.compile = compile
"""
#: that does not expect Ctrl-C
UNHANDLED = """
import atexit
atexit.register(print, "what else is to be done")
LLM(sys.argv[1], skip_tokenizer_init=True, **SMALL)
"""
#: that goes on after it
HANDLED = """
try:
    LLM(sys.argv[1], skip_tokenizer_init=True, **SMALL)
except KeyboardInterrupt:
    print("the program goes on")
    ended.set()
    sys.exit(3)
"""


#: Ctrl-C while JAX is imported, where the collector of garbage drops what is raised
IMPORTING = """
import gc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

def collected(phase, info):
    if "jax" in sys.modules and collected in gc.callbacks:
        gc.callbacks.remove(collected)
        os.kill(os.getpid(), signal.SIGINT)

gc.set_threshold(100)
gc.callbacks.append(collected)
"""
SCRIPT = "from jaxllm import LLM"
COMMAND = """
from jaxllm.entrypoints.cli import main
sys.exit(main(["generate", "a", "--load-format", "null", "--model", sys.argv[1]]))
"""


@pytest.fixture(scope="module", autouse=True)
def program_store() -> None:
    """In place of the end-to-end tests': an engine that finds its programs has nothing to compile."""


class Compiler:
    """In place of XLA's: it takes until the test is over."""

    def __init__(self):
        self.begun, self.ended = threading.Event(), threading.Event()

    def compile(self, *_: Any, **__: Any) -> None:
        self.begun.set()
        # whoever waits for it does not wait for ever
        self.ended.wait(60)
        self.ended.set()
        raise RuntimeError("not compiled")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    made = Compiler()
    monkeypatch.setattr(jax.stages.Lowered, "compile", made.compile)
    yield made
    made.ended.set()


def press_ctrl_c(compiler: Compiler) -> threading.Thread:
    """In a while."""

    def press() -> None:
        if compiler.begun.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_nobody_waits_for_the_compiler(tiny_model: Path, compiler: Compiler):
    before = live()
    thread = press_ctrl_c(compiler)
    with pytest.raises(KeyboardInterrupt) as caught:
        LLM(tiny_model, **SMALL)
    thread.join()
    assert not compiler.ended.is_set()
    assert len(caught.traceback) == 1, "the caller's line"
    assert live() <= before


def test_an_engine_that_starts_inside_of_a_task(tiny_model: Path, compiler: Compiler):
    """`asyncio.run` takes Ctrl-C for itself, and cancels the task."""

    async def main() -> None:
        AsyncLLM(tiny_model, **SMALL)

    thread = press_ctrl_c(compiler)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    thread.join()
    assert not compiler.ended.is_set()


def test_an_engine_that_starts_beside_the_event_loop(tiny_model: Path, compiler: Compiler):
    before = live()

    async def main() -> None:
        await AsyncLLM.start(tiny_model, **SMALL)

    thread = press_ctrl_c(compiler)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    thread.join()
    assert not compiler.ended.is_set()
    assert live() <= before


class Finalized:
    """Python drops what its finalizer raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_what_python_drops_is_raised_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    phases, never = [], threading.Event()

    def check(*_: Any, **__: Any) -> None:
        Finalized()
        phases.append("interrupted")
        never.wait(60)
        phases.append("waited")

    monkeypatch.setattr(Checkpoint, "check", check)
    with pytest.raises(KeyboardInterrupt):
        LLM(tiny_model, **SMALL)
    assert phases == ["interrupted"]


def test_nobody_waits_for_a_tokenizer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Inside of a task, where Ctrl-C raises nothing, but cancels."""
    ended = threading.Event()

    def slow(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(60)
        ended.set()

    async def main() -> None:
        AsyncLLM(tiny_model, load_format="null")

    monkeypatch.setattr("jaxllm.startup.start.load_tokenizer", slow)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert not ended.is_set()
    ended.set()


@pytest.mark.parametrize(
    ("program", "status", "output"),
    [
        (UNHANDLED, -signal.SIGINT, "compiling\nwhat else is to be done\n"),
        (HANDLED, 3, "compiling\nthe program goes on\n"),
    ],
    ids=["unhandled", "handled"],
)
def test_a_program_ends_as_it_would_have(tiny_model: Path, tmp_path: Path, program: str, status: int, output: str):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "JAXLLM_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, str(tiny_model)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert first + rest == output and process.returncode == status, errors
    if status != 3:
        lines = errors[errors.index("Traceback") :].splitlines()
        assert len(re.findall("^  File ", errors, re.MULTILINE)) == 1 and lines[-1] == "KeyboardInterrupt", errors
    else:
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("program", "status", "last"),
    [(SCRIPT, -signal.SIGINT, "KeyboardInterrupt"), (COMMAND, 130, "jaxllm: interrupted")],
    ids=["script", "command"],
)
def test_imports_are_not_interrupted_inside(tiny_model: Path, program: str, status: int, last: str):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING + program, str(tiny_model)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    # the line of the program, and Python's own import
    assert (done.returncode, lines[-1]) == (status, last) and len(lines) <= 5, done.stderr
