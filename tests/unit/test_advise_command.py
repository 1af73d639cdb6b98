"""``jaxllm advise``: of a trace's file, and of a scrape of vLLM; neither needs a device."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from support.local_host import local_host, send
from support.tiny_model import write_tiny_model
from test_advice import ROOMY, prompts

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter, Histogram, Vector
from jaxllm.engine.observe.prometheus import metrics_registry
from jaxllm.entrypoints.cli import main
from jaxllm.tuning.advice.advice import AdviceList
from jaxllm.tuning.advice.advise import advise, load_of_trace
from jaxllm.tuning.advice.read import parse_metrics, read_metrics
from jaxllm.tuning.trace_file import read_trace

VLLM = Path(__file__).parents[1] / "data" / "vllm_metrics.txt"


def test_a_trace_is_saved_and_read_where_there_is_no_device(tmp_path: Path):
    model = write_tiny_model(tmp_path)
    with LLM(model, **{**ROOMY, "num_gpu_blocks_override": 60}) as llm:
        with llm.trace() as trace:
            llm.generate([{"prompt_token_ids": ids} for ids in prompts(12, 40)], SamplingParams(max_tokens=24))
        said = str(llm.advise(trace))
        scraped = generate_latest(metrics_registry(llm.get_metrics)).decode()
        from_server = read_metrics(llm.serve_metrics().url, {"max_num_seqs": 16})
    trace.save(tmp_path / "trace.json")
    assert "preemptions" in said and str(advise(load_of_trace(read_trace(tmp_path / "trace.json")))) == said
    code = (
        "import sys\nfrom jaxllm.entrypoints.cli import main\n"
        f"main(['advise', {str(tmp_path / 'trace.json')!r}])\n"
        "print(*[name for name in ('jax', 'jaxlib', 'transformers') if name in sys.modules], 'loaded')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f"{said}\nloaded\n"
    # what Prometheus gets of jaxllm has the same numbers, under the same names
    found = {(metric.name, tuple(sorted(metric.labels.items()))): metric for metric in parse_metrics(scraped, "text")}
    for metric in llm_metrics(trace):
        assert found[metric.name, tuple(sorted(metric.labels.items()))] == metric
    advice = advise(from_server).of("preemptions")
    assert advice is not None and advice.setting[:2] == ("max_num_seqs", 7)


def llm_metrics(trace: object) -> list[Counter | Histogram]:
    """Of an engine that did nothing before."""
    kept = getattr(trace, "metrics")  # noqa: B009
    names = {"vllm:num_preemptions", "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:iteration_tokens_total"}
    chosen = [metric for metric in kept if metric.name in names]
    assert len(chosen) == len(names)
    return chosen


def test_a_scrape_of_vllm():
    load = read_metrics(str(VLLM), {"max_num_batched_tokens": 2048, "num_speculative_tokens": 5})
    found = advise(load, itl=None)
    assert [advice.kind for advice in found] == ["preemptions", "budget too small", "speculation"]
    # requests of up to 1000 + 1000 tokens need 125 blocks; 160 are there, and 47 fit into 5,999 blocks
    preemptions = found[0]
    assert preemptions.numbers["blocks_needed"] == 160 * 125
    assert preemptions.setting[:2] == ("max_num_seqs", 47)
    half = advise(read_metrics(str(VLLM), {"max_num_seqs": 80})).of("preemptions")
    assert half is not None and [each.argument for each in half.instead] == [
        "tensor_parallel_size", "pipeline_parallel_size",
    ]  # fmt: skip
    assert found[1].setting[:2] == ("max_num_batched_tokens", 4096)
    # the third place is right in 8% of the checks
    assert found[2].setting[:2] == ("num_speculative_tokens", 2)
    # 48 requests take 31% of the cache: three times as many take 90%
    calm = tuple(metric for metric in load.metrics if metric.name != "vllm:num_preemptions")
    queue = advise(dataclasses.replace(load, metrics=calm)).of("queue")
    assert queue is not None and queue.setting[:2] == ("max_num_seqs", 139)
    late = advise(load, itl=0.05).of("budget too large")
    assert late is not None and late.setting[:2] == ("max_num_batched_tokens", 1024)
    # 13,800 of 204,800 tokens came later than 50 ms after the one before
    assert late.numbers["late_share"] == pytest.approx(13800 / 204800)
    assert advise(load, itl=0.15).of("budget too large") is None
    assert load.values("vllm:spec_decode_num_accepted_tokens_per_pos") == [6000, 2400, 800, 150, 50]
    assert any(isinstance(metric, Vector) for metric in load.metrics)


def test_a_scrape_of_vllm_whose_blocks_are_evicted_too_soon(tmp_path: Path):
    """``--kv-cache-metrics`` of vLLM: half of what is evicted was idle for 5 s, and what is used again after 20."""

    def scraped(idle: str) -> str:
        lines = ['vllm:cache_config_info{block_size="16",num_gpu_blocks="6000",gpu_memory_utilization="0.9"} 1']
        for name, bounds in {
            "kv_block_reuse_gap_seconds": {"5": 10, "20": 95, "+Inf": 100},
            "kv_block_idle_before_evict_seconds": {idle: 60, "+Inf": 100},
        }.items():
            lines += [f"# TYPE vllm:{name} histogram"]
            lines += [f'vllm:{name}_bucket{{le="{bound}"}} {count}' for bound, count in bounds.items()]
            lines += [f"vllm:{name}_sum 1000", f"vllm:{name}_count 100"]
        return "\n".join(lines) + "\n"

    (tmp_path / "metrics.txt").write_text(scraped("5"))
    advice = advise(read_metrics(str(tmp_path / "metrics.txt"), {})).of("evicted prefixes")
    assert advice is not None and advice.setting[:2] == ("gpu_memory_utilization", 0.95)
    assert [setting.argument for setting in advice.instead] == ["kv_offloading_size"]
    # with room for them, blocks are idle for longer before they go
    (tmp_path / "metrics.txt").write_text(scraped("60"))
    assert advise(read_metrics(str(tmp_path / "metrics.txt"), {})).of("evicted prefixes") is None


def in_form(text: str, form: str) -> str:
    """vLLM's metrics as others hand them on."""
    if form == "without comments":
        return "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    if form == "untyped":  # Prometheus' federation
        return re.sub(r"^(# TYPE \S+) \w+$", r"\1 untyped", text, flags=re.MULTILINE)
    if form == "openmetrics":
        return re.sub(r"^(# \w+ \S+)_total(.* counter)$", r"\1\2", text, flags=re.MULTILINE) + "# EOF\n"
    if form == "without _total":
        counters = re.findall(r"^# TYPE (\S+)_total counter$", text, flags=re.MULTILINE)
        return re.sub(rf"\b({'|'.join(counters)})_total\b", r"\1", text)
    assert form == "with a mark of its encoding"
    return f"\ufeff{text}"


@pytest.mark.parametrize(
    "form", ["without comments", "untyped", "openmetrics", "without _total", "with a mark of its encoding"]
)
def test_a_scrape_that_others_handed_on(form: str, tmp_path: Path):
    text = VLLM.read_text()
    given = {"max_num_batched_tokens": 2048, "num_speculative_tokens": 5}
    (tmp_path / "metrics.txt").write_text(in_form(text, form), encoding="utf-8")
    assert in_form(text, form) != text
    found = advise(read_metrics(str(tmp_path / "metrics.txt"), given), itl=0.05)
    assert str(found) == str(advise(read_metrics(str(VLLM), given), itl=0.05)) and len(found) == 3


def test_a_scrape_of_several_engines_from_its_url():
    """Counters are of all of them; of queues each has its own."""
    names = {"running": (40, 20), "waiting": (0, 30)}
    lines = [f'vllm:num_requests_{name}{{engine="{engine}"}} {value}'
             for name, values in names.items() for engine, value in enumerate(values)]  # fmt: skip
    lines += [f'vllm:kv_cache_usage_perc{{engine="{engine}"}} {usage}' for engine, usage in ((0, 0.9), (1, 0.3))]
    checks = {"drafts": 40, "draft_tokens": 40, "accepted_tokens": 2}
    for engine in (0, 1):
        lines += [f'vllm:spec_decode_num_{name}_total{{engine="{engine}"}} {count}' for name, count in checks.items()]
        place = f'{{engine="{engine}",position="0"}} 2'
        lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{place}")

    def asked() -> AdviceList:
        with local_host(lambda handler: send(handler, 200, "\n".join(lines).encode())) as url:
            return advise(read_metrics(f"{url}/metrics", {}))

    queue, drafts = asked()
    assert queue.kind == "queue" and "30 requests wait while 20 run in engine 1, and 30%" in queue.evidence
    assert queue.setting[:2] == ("max_num_seqs", 50)
    assert drafts.kind == "speculation" and drafts.numbers["checks"] == 80 and drafts.numbers["accepted"] == 4
    # what Prometheus has of two servers of one engine each
    of_engines = lines.copy()
    lines[:] = [re.sub('engine="(.)"', r'engine="0",instance="host\1:8000"', line) for line in lines]
    queue, drafts = asked()
    assert "30 requests wait while 20 run in engine 0 of host1:8000, and 30%" in queue.evidence
    assert queue.setting[:2] == ("max_num_seqs", 50) and drafts.numbers["checks"] == 80
    # of the other one nobody waits
    lines[:] = of_engines
    lines[3] = 'vllm:num_requests_waiting{engine="1"} 0'
    assert [each.kind for each in asked()] == ["speculation"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 metrics, and none whose name begins with 'vllm:'"),
        ("go_goroutines 7\n", "has 1 metrics, and none whose name begins with 'vllm:'"),
        ("vllm:num_requests_running{engine=\n", "is not in Prometheus' text format"),
        ('vllm:num_requests_running{engine="0"\n', "is not in Prometheus' text format"),
        ("vllm:num_requests_running\n", "is not in Prometheus' text format"),
        ("# TYPE vllm:x\nvllm:x 1\n", "is not in Prometheus' text format"),
        ('vllm:request_prompt_tokens_bucket{le="1"} +Inf\n', "is not in Prometheus' text format"),
        ("<!DOCTYPE html><html><body>Not Found</body></html>\n", "is not in Prometheus' text format"),
    ],
)
def test_a_scrape_that_is_none_is_told(text: str, message: str, tmp_path: Path):
    (tmp_path / "metrics.txt").write_text(text)
    with pytest.raises(ValidationError, match=message):
        read_metrics(str(tmp_path / "metrics.txt"), {})


def test_a_scrape_that_was_cut_off_says_what_it_has(tmp_path: Path):
    """Histograms without their last bounds, and numbers that are none."""
    whole = VLLM.read_text()
    cut = whole[: whole.index('vllm:request_prompt_tokens_bucket{engine="0",le="500.0"')]
    (tmp_path / "metrics.txt").write_text(f'{cut}vllm:kv_cache_usage_perc{{engine="1"}} NaN\n')
    found = advise(read_metrics(str(tmp_path / "metrics.txt"), {"max_num_batched_tokens": 2048}), itl=0.05)
    assert {"preemptions", "speculation"} <= {each.kind for each in found}


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert (
        main(["advise", "--vllm-metrics", str(VLLM), "--max-num-batched-tokens", "2k", "--itl", "50ms", "--json"]) == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["preemptions", "speculation", "budget too large"]
    assert {"evidence", "argument", "value", "instead", "numbers"} <= lines[0].keys()
    assert main(["advise", "--vllm-metrics", str(VLLM), "--max-num-batched-tokens", "2k"]) == 0
    assert "Metrics do not say what --max-num-seqs was: with it, more can be told." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a trace or --vllm-metrics"),
        (["none.json"], "none.json cannot be read: No such file"),
        ([str(VLLM)], "is not a trace that `trace.save"),
        (["--vllm-metrics", "none.txt"], "none.txt cannot be read"),
        (["--vllm-metrics", "ftp://host/metrics"], "is no URL of http or https"),
        (["--vllm-metrics", "file:///etc/passwd"], "is no URL of http or https"),
        (["--vllm-metrics", "http://127.0.0.1:1/metrics"], "cannot be reached"),
        (["--vllm-metrics", __file__], "is not in Prometheus' text format"),
        ([str(VLLM), "--max-num-seqs", "4"], "--max-num-seqs is for --vllm-metrics"),
        (["--vllm-metrics", str(VLLM), "--itl", "soon"], "--itl must be a time such as 50ms"),
        (["--vllm-metrics", str(VLLM), "--itl", "0"], "itl must be a number of seconds greater than 0"),
    ],
)
def test_bad_input_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["advise", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_trace_for_perfetto_is_told_from_the_one_that_is_wanted(tmp_path: Path):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    with pytest.raises(ValidationError, match="It is a trace for Perfetto: trace.save"):
        read_trace(tmp_path / "trace.json")


@pytest.mark.parametrize("settings", [[1], "settings", 3])
def test_settings_that_are_none_are_told(settings: object, tmp_path: Path):
    found = {"steps": [], "requests": [], "settings": settings, "metrics": []}
    (tmp_path / "trace.json").write_text(json.dumps(found))
    with pytest.raises(ValidationError, match="is not a trace that `trace.save"):
        read_trace(tmp_path / "trace.json")


def test_nobody_is_asked_but_whom_the_user_named():
    elsewhere = {"Location": "http://example.org/metrics"}
    with local_host(lambda asked: send(asked, 302, headers=elsewhere)) as url:
        with pytest.raises(ValidationError, match="answers 302"):
            read_metrics(f"{url}/metrics", {})
