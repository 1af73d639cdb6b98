"""A batch that is killed again and again ends with every result there once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STARTER = Path(__file__).parents[1] / "support" / "batch_starter.py"
NUM_LINES = 4000
NUM_KILLS = 20


@pytest.fixture(scope="module")
def starter(tiny_model: Path) -> Iterator[subprocess.Popen[str]]:
    """See `batch_starter`."""
    with subprocess.Popen(
        [sys.executable, str(STARTER), str(tiny_model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(STARTER.parent.parent)},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def write_batch(path: Path) -> None:
    """Completions and conversations; every 50th line is refused, every 500th has no custom_id."""
    with open(path, "w") as file:
        for i in range(NUM_LINES):
            line: dict[str, Any] = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions"}
            line["body"] = {"prompt": f"Number {i} is", "max_tokens": 1 + i % 7}
            if i % 3 == 0:
                line["url"] = "/v1/chat/completions"
                line["body"] = {"messages": [{"role": "user", "content": f"Is {i} even?"}], "max_tokens": 2 + i % 5}
            if i % 50 == 0:
                line["body"]["temperature"] = "hot"
            if i % 500 == 0:
                del line["custom_id"]
            file.write(json.dumps(line) + "\n")


def essence(record: dict[str, Any]) -> tuple[Any, ...]:
    """What does not depend on when a line ran."""
    body = record["response"]["body"]
    if record["error"]:
        return record["id"], record["custom_id"], record["response"]["status_code"], body["error"]["message"]
    texts = [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]
    return record["id"], record["custom_id"], texts, body["usage"]["total_tokens"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().splitlines()]


@pytest.mark.thorough
def test_twenty_kills_lose_and_double_nothing(tiny_model: Path, tmp_path: Path, starter: subprocess.Popen[str]) -> None:
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write_batch(source)

    def command(target: Path, *more: str) -> list[str]:
        argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", str(tiny_model)]
        return [*argv, "--load-format", "null", "--max-num-seqs", "32", *more]

    def start(argv: list[str]) -> int:
        assert starter.stdin is not None and starter.stdout is not None
        print(json.dumps(argv), file=starter.stdin, flush=True)
        return int(starter.stdout.readline())

    def status() -> int:
        assert starter.stdout is not None
        return int(starter.stdout.readline())

    start(command(whole))
    assert status() == 3, "some lines are refused"

    dice = random.Random(0)
    total = whole.stat().st_size
    kills = 0
    for attempt in range(NUM_KILLS):
        pid = start(command(output, "--resume"))
        # somewhere in the next part of the work; what is left after the last kill is the time that a busy machine may
        # need for it
        goal = 0.7 * total * (attempt + dice.random()) / NUM_KILLS
        deadline = time.monotonic() + 60
        while (output.stat().st_size if output.exists() else 0) < goal and time.monotonic() < deadline:
            time.sleep(dice.random() / 500)
        os.kill(pid, signal.SIGKILL)
        kills += status() == -signal.SIGKILL
    assert kills == NUM_KILLS, "the batch was over before all kills"
    assert len(records(output) if output.read_bytes().endswith(b"\n") else []) < NUM_LINES

    start(command(output, "--resume"))
    assert status() == 3
    found = records(output)
    assert len(found) == NUM_LINES
    assert sorted(map(essence, found)) == sorted(map(essence, records(whole)))
