"""An engine over the devices of several processes answers as one process does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.own_process import environment
from support.tensor_parallel import ARGUMENTS, HEADS, answers
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm import LLM

PROCESSES = 2


def processes(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each of `count` processes found that run `support.several_hosts` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "support.several_hosts", str(folder), address, str(count), str(number)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        done = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, said) in zip(started, done, strict=True):
        assert process.returncode == 0, said
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in HEADS.items():
            patch.setitem(CONFIG, name, value)
        return write_tiny_model(folder)


@pytest.fixture(scope="module")
def found(model: Path) -> list[dict[str, Any]]:
    """What each of the processes found."""
    return processes(model, PROCESSES)


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, Any]:
    """What one device of one process answers."""
    with LLM(model, **ARGUMENTS) as llm:
        return {**answers(llm), "weights": llm.memory_plan.weight_bytes}


@pytest.mark.parametrize("kind", ["greedy", "seeded", "after prefix hits", "structured"])
@pytest.mark.parametrize("process", range(PROCESSES))
def test_tokens_are_those_of_one_process(found: list[dict[str, Any]], whole: dict[str, Any], process: int, kind: str):
    assert found[process]["together"][kind] == whole[kind]


@pytest.mark.parametrize("kind", ["prompt logprobs", "logprobs"])
def test_log_probabilities_are_those_of_one_process(found: list[dict[str, Any]], whole: dict[str, Any], kind: str):
    for each in found:
        np.testing.assert_allclose(each["together"][kind], whole[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", range(PROCESSES))
def test_requests_were_preempted_and_found_their_prefix(found: list[dict[str, Any]], process: int):
    together = found[process]["together"]
    assert together["preemptions"] > 0 and together["prefix hits"] > 0


@pytest.mark.parametrize("kind", ["streamed", "read again"])
def test_what_takes_time_is_waited_for(found: list[dict[str, Any]], whole: dict[str, Any], kind: str):
    """Prompts without a length are read between the same steps; weights are read anew by each process."""
    assert [each["together"][kind] for each in found] == [whole["greedy"]] * PROCESSES


def test_drafts_of_several_processes_are_checked_as_those_of_one(found: list[dict[str, Any]], whole: dict[str, Any]):
    first, second = (each["together"]["drafted"] for each in found)
    assert first == second
    assert {kind: first[kind] for kind in ("greedy", "seeded")} == {kind: whole[kind] for kind in ("greedy", "seeded")}
    assert first["right"] > 0


def test_each_process_has_its_part_of_the_weights(found: list[dict[str, Any]], whole: dict[str, Any]):
    held = [each["together"]["held"] for each in found]
    # two of four devices: half of it, the norms whole on each, and 257 words filled up to 260
    assert held[0] == held[1] == 2 * found[0]["together"]["planned"] < 0.6 * whole["weights"]
    assert found[0]["together"]["blocks"] == found[1]["together"]["blocks"]
    assert "Mesh: tensor=4" in found[1]["together"]["explained"]


def test_what_needs_one_process_is_refused(found: list[dict[str, Any]]):
    for each in found:
        refused = each["together"]
        assert "lie in 2 processes, and none has all of them" in refused["no save"]
        assert "sleep(level=2) reads them anew" in refused["no sleep"]
        assert refused["no async"].startswith("AsyncLLM with tensor_parallel_size=4 over 2 processes")
        assert "2 processes must have as many of them each. What would work: 1, 2, 4." in refused["no three"]
        assert "a model is split by tensor_parallel_size alone" in refused["no stages"]


def test_an_engine_that_its_process_has_room_for_is_its_own(found: list[dict[str, Any]]):
    assert [each["alone"] for each in found] == [[0, 0], [1, 1]]


def test_processes_that_are_given_something_else_are_told_so(found: list[dict[str, Any]], whole: dict[str, Any]):
    """Each of what both were given; then they go on together."""
    first, second = (each["together"]["differ"] for each in found)
    assert first == second
    prompt, params, number, streamed, stepped = first
    assert "prompts[1] is 'of process 0' in process 0, and 'of process 1' in process 1" in prompt
    assert "what is asked of prompts[1] is ..." in params and "max_tokens=1" in params and "max_tokens=2" in params
    for text in (number, streamed):
        assert "the number of prompts is 1 in process 0, and 2 in process 1. None of them runs." in text
    assert "the request is '0' in process 0, and '1' in process 1" in stepped
    assert [each["together"]["went on"] for each in found] == [whole["greedy"]] * PROCESSES
