"""``jaxllm bench serve`` asks a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxllm import AsyncLLM
from jaxllm.entrypoints.cli import main


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_benchmark_asks_a_server(
    url: str, engine: AsyncLLM, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
):
    written = tmp_path / "out.json"
    options = ["--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5", "--max-concurrency", "3"]
    options += ["--request-rate", "200", "--goodput", "ttft:60000", "tpot:0.0001", "--metric-percentiles", "50,99"]
    options += ["--model", str(tiny_model), "--backend", backend, "--output-json", str(written), "--base-url", url]
    before = engine.engine.core.stats().generation_tokens
    assert main(["bench", "serve", *options]) == 0
    # one request warms up
    assert engine.engine.core.stats().generation_tokens - before == 7 * 5
    record = json.loads(written.read_text())
    assert (record["completed"], record["failed"], record["total_output_tokens"]) == (6, 0, 30)
    assert record["total_input_tokens"] >= 120
    assert record["request_goodput"] == 0 and 0 < record["median_ttft_ms"] <= record["p99_e2el_ms"]
    printed = capsys.readouterr().out
    for line in ("Successful requests:                     6", "Request goodput (req/s):", "P50 TPOT (ms):", "P99 ITL"):
        assert line in printed
    assert "E2EL" not in printed


def test_the_benchmark_says_what_is_wrong(url: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    few = ["bench", "serve", "--model", str(tiny_model), "--num-prompts", "2", "--input-len", "4"]
    for options, text in (
        (["--base-url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--base-url", url, "--served-model-name", "gpt"], "status 404: The model `gpt` does not exist"),
        (["--base-url", url, "--goodput", "itl:5"], "'itl:5' is not NAME:MILLISECONDS"),
        (["--base-url", url, "--percentile-metrics", "x"], "there are ttft, tpot, itl, e2el"),
    ):
        assert main([*few, *options]) == 1
        assert text in capsys.readouterr().err
