"""What the benchmarks refuse before anything runs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.bench import report
from jaxllm.bench.options import add_perplexity_options
from jaxllm.bench.perplexity import forms, with_form
from jaxllm.bench.session import JaxLLMSession
from jaxllm.bench.startup import start_once
from jaxllm.command_options import engine_arguments
from jaxllm.config.option_values import output_file
from jaxllm.entrypoints.cli import main


@pytest.mark.parametrize("option", ["--output-json", "--trace"])
@pytest.mark.parametrize(("path", "message"), [("nowhere/x.json", "there is no folder"), (".", "is a folder")])
def test_a_file_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, path: str, message: str
):
    with pytest.raises(SystemExit):
        main(["bench", "host", option, str(tmp_path / path)])
    found = capsys.readouterr()
    assert f"argument {option}: " in found.err and message in found.err and not found.out


def test_asking_whether_a_file_can_be_written_leaves_none(tmp_path: Path):
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json" and not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("kept")
    assert output_file(str(tmp_path / "old.json")).read_text() == "kept"


def test_a_record_is_json_that_every_reader_takes(tmp_path: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report.write(tmp_path / "x.json", argparse.Namespace(request_rate=math.inf, seed=3), {"found": 1})
    record = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert record["arguments"] == {"request_rate": "inf", "seed": 3} and record["found"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_an_error_of_one_line():
    with pytest.raises(JaxLLMError, match="/dev/full cannot be written: No space left"):
        report.write(Path("/dev/full"), argparse.Namespace(), {})


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
        ("throughput", "--num-iters", "0", "is below 1"),
        ("throughput", "--threads", "-1", "is below 1"),
        ("throughput", "--random-prefix-len", "-5", "is below 0"),
        ("throughput", "--prefix-repetition-prefix-len", "-4", "is below 0"),
        ("latency", "--num-iters-warmup", "-3", "is below 0"),
        ("latency", "--batch-size", "0", "is below 1"),
        ("serve-trace", "--num-prompts", "0", "is below 1"),
        ("serve-trace", "--max-concurrency", "0", "is below 1"),
        ("tokenizer", "--repeat", "0", "is below 1"),
        ("tokenizer", "--workers", "0", "is below 1"),
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, message: str):
    with pytest.raises(SystemExit):
        main(["bench", command, f"{option}={value}"])
    assert f"argument {option}" in (error := capsys.readouterr().err) and message in error


def test_a_start_that_fails_says_why_in_a_line():
    job = {"model": "nosuch/model", "engine_args": {"max_model_len": 0}, "input_len": 8}
    with pytest.raises(JaxLLMError, match="the engine did not start, exit status 1:\n") as caught:
        start_once(job, {"PATH": "", "HF_HUB_OFFLINE": "1"})
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"], "nothing to measure"),
        (["startup", "--max-model-len", "64", "--input-len", "64"], "--input-len 64 leaves no room"),
        (["host", "--peer-python", "vllm=python3"], "--peer-python is for --compare"),
        (["host", "--num-seqs", "1", "1"], "--num-seqs has a number twice: 1 1"),
        (["latency", "--sweep-context", "8", "--plot", "x.xyz"], "--plot draws a .png, .svg, .pdf file"),
        (["serve-trace", "--burstiness", "inf"], "--burstiness is finite"),
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


def test_forms_of_weights_and_of_the_cache_are_compared_one_by_one():
    def asked(**options: object) -> dict[str, dict[str, object]]:
        names = ("dtype", "quantization", "kv_cache_dtype", "model")
        return forms(argparse.Namespace(**{**{f"sweep_{name}": None for name in names}, "config": None, **options}))

    assert asked() == {"none": {}}
    assert asked(quantization="int8") == {"int8": {}}
    sweeps = {"sweep_quantization": ["none", "fp8"], "sweep_kv_cache_dtype": ["int8"], "sweep_model": ["a/b.gguf", "c"]}
    found = asked(**sweeps, kv_cache_dtype="fp8")
    assert found == {
        "none": {"quantization": None},
        "fp8": {"quantization": "fp8"},
        "int8 KV cache": {"kv_cache_dtype": "int8"},
        "b": {"model": "a/b.gguf", "quantization": "gguf"},
        "c": {"model": "c", "quantization": None},
    }


def test_the_weights_as_they_are_are_not_those_of_a_configuration(tmp_path: Path):
    """A sweep's "none" wins over the file, too."""
    (tmp_path / "c.yaml").write_text("model: smollm2-135m-instruct\nquantization: int8\n")
    parser = argparse.ArgumentParser()
    add_perplexity_options(parser)
    for words, expected in (
        ([], {"int8": "int8"}),
        (["--sweep-quantization", "none,fp8"], {"none": None, "fp8": "fp8"}),
        (["--sweep-model", "other"], {"other": None}),
    ):
        arguments = parser.parse_args(["--config", str(tmp_path / "c.yaml"), *words])
        given = {name: with_form(arguments, changes) for name, changes in forms(arguments).items()}
        models = {name: engine_arguments(each)[0] for name, each in given.items()}
        assert {name: engine_arguments(each)[1]["quantization"] for name, each in given.items()} == expected
        assert models == dict.fromkeys(expected, "other" if "other" in expected else "smollm2-135m-instruct")
