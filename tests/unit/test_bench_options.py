"""What the benchmarks refuse before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.entrypoints.bench.session import JaxLLMSession
from jaxllm.entrypoints.bench.startup import start_once
from jaxllm.entrypoints.cli import main
from jaxllm.errors import JaxLLMError, ValidationError


@pytest.mark.parametrize("option", ["--output-json", "--trace"])
@pytest.mark.parametrize(("path", "message"), [("nowhere/x.json", "there is no folder"), (".", "is a folder")])
def test_a_file_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, path: str, message: str
):
    with pytest.raises(SystemExit):
        main(["bench", "host", option, str(tmp_path / path)])
    found = capsys.readouterr()
    assert f"argument {option}: " in found.err and message in found.err and not found.out


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("host", "--num-seqs", "0", "is below 1"),
        ("host", "--steps", "0", "is below 1"),
        ("host", "--warm-up", "-1", "is below 0"),
        ("host", "--prefix-cache", "-1", "is below 1"),
        ("host", "--step-ms", "0", "is not above 0"),
        ("throughput", "--output-len", "0", "is below 1"),
        ("throughput", "--input-len", "-5", "is below 1"),
        ("serve-trace", "--output-len", "-3", "is below 1"),
        ("startup", "--num-iters-warm", "-1", "is below 0"),
        ("startup", "--input-len", "0", "is below 1"),
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, message: str):
    with pytest.raises(SystemExit):
        main(["bench", command, f"{option}={value}"])
    assert f"argument {option}: " in (error := capsys.readouterr().err) and message in error


def test_a_start_that_fails_says_why_in_a_line():
    job = {"model": "nosuch/model", "engine_args": {"max_model_len": 0}, "input_len": 8}
    with pytest.raises(JaxLLMError, match="the engine did not start:\n") as caught:
        start_once(job, {"PATH": "", "HF_HUB_OFFLINE": "1"})
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"], "nothing to measure"),
        (["startup", "--max-model-len", "64", "--input-len", "64"], "--input-len 64 leaves no room"),
        (["host", "--peer-python", "vllm=python3"], "--peer-python is for --compare"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], command: list[str], message: str
):
    assert main(["bench", *command]) == 1
    found = capsys.readouterr()
    assert message in found.err and not found.out


def test_a_request_that_would_end_early_is_refused():
    session = object.__new__(JaxLLMSession)
    session.facts = {"max_model_len": 16}
    session.check([([1] * 8, 8)])
    with pytest.raises(ValidationError, match="8 tokens and 9 more are 17, and max_model_len=16.*--max-model-len"):
        session.check([([1], 1), ([1] * 8, 9)])
