"""A folder that appears when it is complete: whatever ends the process leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.new_folder import appearing

PROGRAM = """
import sys, time
from pathlib import Path
from jaxllm.weights.new_folder import appearing

with appearing(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("something")
    print(folder.name, flush=True)
    # a signal between the line before and a sleep is heard behind it
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_process_and_leaves_nothing(tmp_path: Path, number: signal.Signals):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert (tmp_path / process.stdout.readline().strip() / "file").exists()
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
    assert not any(tmp_path.iterdir())


def test_a_second_interrupt_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rmtree = shutil.rmtree

    def impatient(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        rmtree(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", impatient)
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "out"):
        signal.raise_signal(signal.SIGINT)
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_programs_own_stays(tmp_path: Path):
    heard: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with appearing(tmp_path / "out") as folder:
            signal.raise_signal(signal.SIGTERM)
            (folder / "file").write_text("something")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM] and (tmp_path / "out" / "file").exists()
    with pytest.raises(WeightsError, match="exists already"), appearing(tmp_path / "out"):
        pass
