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
    options += ["--request-rate", "200", "--goodput", "ttft:60000", "tpot:0.0001", "--metric-percentiles", "50,99,99.9"]
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
    assert "P99.9 TTFT (ms):" in printed and "Peak concurrent requests:                3" in printed
    assert "E2EL" not in printed


def test_the_benchmark_writes_vllms_file(url: str, engine: AsyncLLM, tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    options = ["--model", str(tiny_model), "--base-url", url, "--num-prompts", "5", "--input-len", "9"]
    options += ["--output-len", "4", "--max-concurrency", "2", "--save-result", "--result-dir", str(folder)]
    more = ["--save-detailed", "--plot-timeline", "--metadata", "version=3", "--temperature", "1", "--ignore-eos"]
    assert main(["bench", "serve", *options, *more]) == 0
    image, written = sorted(folder.iterdir(), key=lambda path: path.suffix == ".json")
    assert written.name.startswith(f"openai-infqps-concurrency2-{tiny_model.name}-")
    assert image.name == written.stem + ".timeline.png" and image.read_bytes().startswith(b"\x89PNG")
    record = json.loads(written.read_text())
    assert (record["version"], record["request_rate"], record["num_prompts"]) == ("3", "inf", 5)
    assert record["input_lens"] == [9] * 5 and record["output_lens"] == [4] * 5 and record["errors"] == [""] * 5
    assert [len(times) for times in record["itls"]] == [3] * 5
    assert record["max_concurrent_requests"] >= 2 and record["max_output_tokens_per_s"] > 0
    more = ["--result-filename", "mine.json", "--label", "x", "--plot", str(tmp_path / "plot.svg")]
    assert main(["bench", "serve", *options, *more]) == 0
    assert "ttfts" not in json.loads((folder / "mine.json").read_text())
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_the_benchmark_says_what_is_wrong(url: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    few = ["bench", "serve", "--model", str(tiny_model), "--num-prompts", "2", "--input-len", "4"]
    for options, text in (
        (["--base-url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--base-url", url, "--served-model-name", "gpt"], "status 404: The model `gpt` does not exist"),
        (["--base-url", url, "--goodput", "itl:5"], "'itl:5' is not NAME:MILLISECONDS"),
        (["--base-url", url, "--percentile-metrics", "x"], "there are ttft, tpot, itl, e2el"),
        (["--base-url", url, "--label", "x"], "--save-result"),
        (["--base-url", url, "--save-result", "--metadata", "x"], "'x' is not NAME=VALUE"),
        (["--base-url", url, "--plot", "x.txt"], ".png, .svg, .pdf"),
    ):
        assert main([*few, *options]) == 1
        assert text in capsys.readouterr().err
