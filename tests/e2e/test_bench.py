"""The benchmarks on a small model: what they run, print and write. Nothing here looks at how long anything takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm.engine.engine import Engine
from jaxllm.entrypoints.cli import main

NUMBER = r"[\d.e-]+"


@pytest.fixture
def options(tiny_model: Path) -> list[str]:
    """The engine's, without a longest request."""
    given = {name: value for name, value in SMALL.items() if name not in ("enforce_eager", "max_model_len")}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["--model", str(tiny_model), "--enforce-eager", *(word for pair in pairs for word in pair)]


def bench(name: str, folder: Path, *argv: str) -> dict[str, Any]:
    """Run a benchmark and return what it wrote."""
    path = folder / "out.json"
    assert main(["bench", name, *argv, "--output-json", str(path)]) == 0
    return json.loads(path.read_text())


def test_throughput(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plot = tmp_path / "plot.png"
    record = bench(
        "throughput", tmp_path, *options, "--max-model-len", "256", "--num-iters", "2", "--sweep-num-prompts", "1,5",
        "--input-len", "20", "--output-len", "6", "--plot", str(plot),
    )  # fmt: skip
    for case, count in zip(record["cases"], (1, 5), strict=True):
        assert (case["num_requests"], case["prompt_tokens"], case["output_tokens"]) == (count, 20 * count, 6 * count)
        assert len(case["seconds"]) == len(case["prefill_seconds"]) == 2
        seconds = sum(case["seconds"]) / 2
        assert case["medians"]["seconds"] == pytest.approx(seconds)
    printed = capsys.readouterr().out
    line = rf"Throughput: {NUMBER} requests/s, {NUMBER} total tokens/s, {NUMBER} output tokens/s\n"
    assert len(re.findall(line + r"Total num prompt tokens:  (?:20|100)\n", printed)) == 2
    assert record["engine"]["max_num_seqs"] == 4 and record["arguments"]["sweep_num_prompts"] == [1, 5]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_engines_with_other_arguments_in_turns(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "throughput", tmp_path, *options, "--max-model-len", "256", "--num-iters", "2", "--sweep-num-prompts", "1,3",
        "--input-len", "8", "--output-len", "3", "--against", '{"block_size": 8, "max_num_seqs": 2}',
    )  # fmt: skip
    names = ["as given", "block_size=8, max_num_seqs=2"]
    assert [record["engines"][name]["max_num_seqs"] for name in names] == [4, 2]
    for case, count in zip(record["cases"], (1, 3), strict=True):
        assert list(case) == names and all(found["output_tokens"] == 3 * count for found in case.values())
        assert {len(found[key]) for found in case.values() for key in ("seconds", "processor_seconds")} == {2}
    printed = capsys.readouterr().out
    assert len(re.findall(rf"processor seconds +{NUMBER} +{NUMBER} \({NUMBER}x\)", printed)) == 2
    with pytest.raises(SystemExit):
        main(["bench", "throughput", *options, "--against", "block_size=8"])
    assert main(["bench", "throughput", *options, "--num-prompts", "1", "--against", '{"block_sise": 8}']) != 0
    assert "--against block_sise=8: " in (told := capsys.readouterr().err) and "Did you mean 'block_size'?" in told
    for again in (['{"block_size": 8}', '{"block_size": 8}'], ["{}"]):
        asked = [word for each in again for word in ("--against", each)]
        assert main(["bench", "throughput", *options, "--num-prompts", "1", *asked]) != 0
        assert "none of them twice" in capsys.readouterr().err


def test_lora(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "lora", tmp_path, *options, "--max-model-len", "256", "--num-iters", "2", "--num-iters-warmup", "0",
        "--input-len", "8", "--output-len", "3", "--batch-size", "4", "--max-loras", "2", "--max-lora-rank", "3",
    )  # fmt: skip
    rounds = [times for each in record["rounds"].values() for times in each.values()]
    assert list(record["rounds"]) == ["base", "adapters"] and all(len(times) == 2 for times in rounds)
    line = rf"seconds: base {NUMBER}, 2 adapters {NUMBER}: {NUMBER} times as long\n"
    assert len(re.findall(line, capsys.readouterr().out)) == 2


def test_latency(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "latency", tmp_path, *options, "--max-model-len", "256", "--num-iters", "3", "--num-iters-warmup", "1",
        "--input-len", "20", "--output-len", "6", "--batch-size", "2",
    )  # fmt: skip
    assert record["drafts"] is None
    assert len(record["latencies"]) == 3 and len(record["ttfts_s"]) == len(record["tpots_s"]) == 6
    assert 0 < min(record["ttfts_s"]) <= max(record["ttfts_s"]) < max(record["latencies"])
    assert set(record["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    printed = capsys.readouterr().out
    assert re.search(rf"Avg latency: {NUMBER} seconds\n10% percentile latency: {NUMBER} seconds\n", printed)
    assert re.search(rf"TTFT \(ms\): mean {NUMBER}, median {NUMBER}, p99 {NUMBER}\nTPOT \(ms\): ", printed)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["latency", "throughput"])
def test_drafts_are_asked_for_and_told(
    name: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options.remove("--enforce-eager")
    record = bench(
        name, tmp_path, *options, "--max-model-len", "64", "--max-num-seqs", "1", "--max-num-batched-tokens", "8",
        "--spec-method", "ngram", "--spec-tokens", "1", "--num-iters", "1", "--input-len", "20", "--output-len", "30",
    )  # fmt: skip
    drafts, printed = record["drafts"], capsys.readouterr().out
    steps, drafted, accepted = (drafts[key] for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"))
    assert 0 <= accepted <= drafted == steps
    told = rf"Drafts: {accepted} of {drafted} tokens accepted \({NUMBER}%\), mean acceptance length {NUMBER}\n"
    assert len(re.findall(told, printed)) == 1


def test_sweeps(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plot = tmp_path / "plot.svg"
    record = bench(
        "latency", tmp_path, *options, "--num-iters", "2", "--num-iters-warmup", "1", "--output-len", "3",
        "--batch-size", "2", "--sweep-context", "16,48", "--sweep-blocks", "20,40", "--plot", str(plot),
    )  # fmt: skip
    places = [(point["num_blocks"], point["context"]) for point in record["sweep"]]
    assert places == [(20, 16), (20, 48), (40, 16), (40, 48)]
    assert all(len(point["samples"]) == 2 and point["ms_per_token"] > 0 for point in record["sweep"])
    assert len(re.findall(rf"context +\d+, +\d+ blocks: {NUMBER} ms per token", capsys.readouterr().out)) == 4
    assert b"<svg" in plot.read_bytes()


def test_profile(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "profile", tmp_path, *options, "--max-model-len", "256", "--batch-sizes", "1,3", "--input-len", "20",
        "--output-len", "6",
    )  # fmt: skip
    assert [batch["batch_size"] for batch in record["batches"]] == record["arguments"]["batch_sizes"] == [1, 3]
    for batch in record["batches"]:
        assert sum(program["launches"] for program in batch["programs"] if "forward" in program["program"]) >= 6
        assert sum(program["launches"] for program in batch["programs"] if "sampling" in program["program"]) >= 6
        for program in batch["programs"]:
            assert sum(program["parts_s"].values()) == pytest.approx(program["mean_s"])
            expected = {"products with weights", "attention", "norms"} if "forward" in program["program"] else set()
            assert expected <= set(program["parts_s"])
    printed = capsys.readouterr().out
    assert re.search(rf"3 requests, 20 tokens in, 6 out: {NUMBER} ms a token after the first, {NUMBER} under", printed)
    assert re.search(rf"  forward, \d+ tokens of \d+ sequences: \d+ launches of {NUMBER} ms\n    \D+{NUMBER} ", printed)


def test_a_profile_of_more_requests_than_run_at_once_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "profile", *options, "--max-model-len", "256", "--batch-sizes", "9"]) == 1
    assert "9 requests do not run at once, max_num_seqs is 4: give a larger --max-num-seqs." in capsys.readouterr().err


def test_startup(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "startup", tmp_path, *options, "--max-model-len", "256", "--num-iters-cold", "0", "--num-iters-warmup", "0",
        "--num-iters-warm", "1",
    )  # fmt: skip
    (start,) = record["warm"]["starts"]
    assert {"interpreter", "imports", "load tokenizer", "plan", "load weights", "compile"} <= set(start["phases"])
    # the phases are all there is, but for the moments between them
    assert sum(start["phases"].values()) == pytest.approx(start["seconds"], rel=0.2)
    assert "trace s" in start["compiler"]
    assert record["peak_rss_bytes"] == start["peak_rss_bytes"] > start["planned_bytes"] > 0
    printed = capsys.readouterr().out
    assert "WARM STARTUP:\nAvg startup time: " in printed
    assert ("had to trace or compile" in printed) == (start["compiler"]["trace s"] > 0)
    assert re.search(r"Peak RSS, most of all starts: \d+ MB, \d+ MB above the planned \d+ MB\n", printed)


def test_serve_trace(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    waited: list[Engine] = []
    monkeypatch.setattr(Engine, "wait_until_ready", lambda self: waited.append(self))
    trace = tmp_path / "trace.jsonl"
    rows = [{"prompt": [i + 1] * 9, "output_tokens": i + 1, "timestamp": 100 + i / 50} for i in range(5)]
    rows.append({"prompt": [1] * 400, "output_tokens": 2, "timestamp": 100})
    trace.write_text("\n".join(map(json.dumps, rows)))
    record = bench(
        "serve-trace", tmp_path, *options, "--max-model-len", "256", "--dataset-name", "custom", "--dataset-path",
        str(trace), "--max-concurrency", "2",
    )  # fmt: skip
    assert len(waited) == 1, "no program is compiled beside what is measured"
    # the last one is longer than the engine takes
    assert (record["completed"], record["failed"]) == (5, 1)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (45, 15)
    assert [answer["output_tokens"] for answer in record["answers"]] == [1, 2, 3, 4, 5, 0]
    assert 0 < record["median_ttft_ms"] <= record["p99_e2el_ms"]
    printed = capsys.readouterr().out
    assert (
        "Maximum request concurrency:             2" in printed
        and "Failed requests:                         1" in printed
    )


@pytest.mark.thorough
def test_compared_with_transformers(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "throughput", tmp_path, *options, "--max-model-len", "256", "--num-prompts", "6", "--input-len", "20",
        "--random-range-ratio", "0.5", "--output-len", "12", "--num-iters", "2", "--num-iters-warmup", "0",
        "--compare", "transformers",
    )  # fmt: skip
    (case,) = record["cases"]
    # both compute the same model, each prompt of its own length
    assert case["same_first_tokens"] == {"transformers": 1.0}
    for engine in case["engines"].values():
        assert len(engine["seconds"]) == len(engine["prefill_seconds"]) == 2
    own, other = (case["engines"][name]["medians"] for name in ("jaxllm", "transformers"))
    ratio = own["output_tokens_per_s"] / other["output_tokens_per_s"]
    assert case["ratios"]["transformers"]["output_tokens_per_s"] == pytest.approx(ratio)
    assert record["engines"]["transformers"]["version"].startswith("5.")
    printed = capsys.readouterr().out
    assert re.search(rf"6 +decode tokens/s +{NUMBER} +{NUMBER} \({NUMBER}x\)", printed)
    assert re.search(r"6 +same first tokens +100%", printed)


@pytest.mark.peer
def test_compared_with_llama_cpp_from_process_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = bench(
        "throughput", tmp_path, "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager",
        "--num-prompts", "4", "--input-len", "20", "--output-len", "5", "--num-iters", "1", "--num-iters-warmup", "0",
        "--compare", "llama.cpp", "--include-startup",
    )  # fmt: skip
    (case,) = record["cases"]
    # bfloat16 rounds differently in each
    assert case["same_first_tokens"]["llama.cpp"] >= 0.75
    assert case["ratios"]["llama.cpp"]["seconds"] > 0
    assert "seconds, start included" in capsys.readouterr().out
