"""The benchmark of the host: its clocks against times that are given, its workload against what it says of itself."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.tiny_model import write_tiny_model

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench.host_times import HostTimes, summary
from jaxllm.bench.host_workload import HostWorkload
from jaxllm.bench.measurements import ranks
from jaxllm.bench.peer_setup import pythons
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.step_updates import StepUpdates
from jaxllm.engine.step import SchedulerOutput
from jaxllm.entrypoints.cli import main


def test_the_parts_of_a_cycle_are_the_times_between_the_engines_calls():
    now = 0.0
    times = HostTimes(lambda: now)

    def at(moment: float, call: str, *args: object) -> None:
        nonlocal now
        now = moment
        getattr(times, call)(*args)

    def packing() -> None:
        nonlocal now
        now += 0.25

    step = SchedulerOutput(
        step=0, admitted=[], rows=[0, 1], starts=[0, 5], counts=[3, 1], wanted=[1, 1], new_blocks=[], requests=[],
    )  # fmt: skip
    for first in (0.0, 100.0):
        at(first + 0, "turn_begins")
        at(first + 1, "read_begins", step)
        at(first + 3, "read", step)
        at(first + 7, "updated", step, StepUpdates())
        at(first + 15, "processed", step, StepUpdates())
        at(first + 15, "turn_ends")
        # the caller's time is not the engine's
        times.timed("prompts", packing)()
        at(first + 50, "turn_begins")
        at(first + 51, "scheduled", step)
        times.timed("pack", packing)()
        at(first + 53.25, "launched", step)
    at(200, "read_begins", step)
    assert len(times.cycles) == 2
    for cycle in times.cycles:
        parts = (cycle.read, cycle.update, cycle.schedule, cycle.pack, cycle.launch, cycle.output)
        assert parts == (2.0, 4.0, 1.0, 0.25, 2.0, 8.0)
        assert cycle.total == 17.25
        # from 3 to 53.25, less the 35 between the turns
        assert cycle.critical == 15.25
        assert (cycle.num_tokens, cycle.num_seqs, cycle.prompts) == (4, 2, 0.25)
    found = summary(times.cycles)
    assert found["critical path"]["p50"] == 15250.0 and found["update"]["p99"] == 4000.0


def test_percentiles_are_values_that_occurred():
    values = [float(value) for value in range(200, 0, -1)]
    assert ranks(values) == {"p50": 100.5, "p99": 198.0, "p10": 21.0, "min": 1.0, "mean": 100.5}
    assert ranks([3.0])["p99"] == 3.0


def test_the_workload_is_what_it_says():
    workload = HostWorkload(concurrency=8)
    requests = list(itertools.islice(workload.requests(), 320))
    prompts = [prompt for prompt, _ in requests]
    long = [prompt for prompt in prompts if len(prompt) == workload.long_tokens]
    assert len(long) == 320 // workload.long_every
    assert workload.long_tokens > workload.max_num_batched_tokens, "a long prompt comes in chunks"
    heads = [tuple(prompt[: workload.prefix_tokens]) for prompt in prompts]
    shared = sum(heads.count(head) > 1 for head in heads)
    assert 0.35 < shared / len(prompts) < 0.6
    for prompt, params in requests:
        assert params.max_tokens is not None and 1 <= params.max_tokens <= workload.output_tokens[1]
        assert len(prompt) + params.max_tokens <= workload.max_model_len
    again = list(itertools.islice(workload.requests(), 20))
    assert [prompt for prompt, _ in again] == prompts[:20]
    alone = list(itertools.islice(HostWorkload(concurrency=8, shared_share=0.0).requests(), 320))
    first = [tuple(prompt[:16]) for prompt, _ in alone]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("stream", [False, True])
def test_the_command_prints_a_line_for_each_batch_size_and_writes_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: bool
):
    model = write_tiny_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096, "vocab_size": 4096}))
    # more steps than an output has tokens, so that requests end and come
    arguments = ["--num-seqs", "1", "3", "--steps", "400", "--warm-up", "2", "--trace", str(tmp_path / "trace.json")]
    arguments += ["--output-json", str(tmp_path / "out.json")]
    extra = ["--stream"] if stream else ["--prefix-cache", "2"]
    assert main(["bench", "host", "--model", str(model), *arguments, *extra]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["1", "3"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["arguments"]["steps"] == 400 and {"versions", "machine", "date"} <= record.keys()
    assert set(record["sequences"]) == {"1", "3"} and ("prefix_cache" in record) is not stream
    for found in record["sequences"].values():
        ms = {name: numbers["mean"] for name, numbers in found["ms"].items()}
        parts = sum(ms[name] for name in ("schedule", "pack", "launch", "read", "update", "output"))
        assert found["steps"] == 400 and ms["total"] == pytest.approx(parts)
        assert 0 < ms["critical path"] < ms["total"] * 1.5
        assert all(ms[name] > 0 for name in ("schedule", "pack", "launch", "read", "update", "prompts"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"schedule", "launch", "output"} <= {event["name"] for event in events}


#: stands for a Python that vLLM is installed for: writes down what it is asked, and answers steps of 0.25 and 0.5 ms
FAKE_VLLM = f"""#!{sys.executable}
import json, pathlib, sys
if sys.argv[1:2] == ["-c"]:
    sys.exit()
job = json.load(sys.stdin)
job["requests"] = json.loads(pathlib.Path(job["requests"]).read_text())
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(job))
if job["concurrency"] == 3:
    sys.exit("a word at the end")
times = [job["steps"] * [seconds] for seconds in (0.00025, 0.0005)]
print(json.dumps(dict(schedule=times[0], update=times[1], tokens=[1] * job["steps"], version="1.2")))
"""


def test_vllms_scheduler_gets_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_tiny_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096, "vocab_size": 4096}))
    python = tmp_path / "vllm_python"
    python.write_text(FAKE_VLLM)
    python.chmod(0o755)
    command = ["bench", "host", "--model", str(model), "--steps", "12", "--warm-up", "2", "--compare", "vllm"]
    command += ["--peer-python", f"vllm={python}", "--output-json", str(tmp_path / "out.json"), "--num-seqs"]
    assert main([*command, "2"]) == 0
    assert "vLLM 1.2, its scheduler alone: schedule 0.250 (0.25), " in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["sequences"]["2"]["vllm"]
    assert found["ms"]["update"]["p50"] == 0.5 and found["tokens"]["mean"] == 1
    job = json.loads(python.with_suffix(".json").read_text())
    workload = HostWorkload(concurrency=2)
    expected = [
        [prompt, params.max_tokens] for prompt, params in itertools.islice(workload.requests(), len(job["requests"]))
    ]
    assert job["requests"] == expected
    # the first ones run, and one that ends makes room for the next
    assert sum(length for _, length in expected[2:]) > 2 * (12 + 2 * 2)
    assert (job["steps"], job["max_model_len"]) == (12, workload.max_model_len)
    assert main([*command, "3"]) == 1
    assert "vLLM's scheduler did not run, exit status 1:\na word at the end" in capsys.readouterr().err


def test_jaxllm_under_vllms_name_is_no_vllm_to_compare_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValidationError, match="vllm is not installed for"):
        pythons([], ["vllm"])


# The order of the engine's work, which the benchmark relies on.


def test_the_next_step_is_launched_before_one_is_read(monkeypatch: pytest.MonkeyPatch):
    engine = FakeEngine()
    order: list[tuple[str, int]] = []
    process, execute = engine.core._outputs.process, engine.device.execute

    def processing(*args: Any) -> Any:
        order.append(("outputs", 0))
        return process(*args)

    monkeypatch.setattr(engine.core._outputs, "process", processing)
    engine.device.execute = lambda scheduled: (order.append(("launch", scheduled.step)), execute(scheduled))[1]
    for name in ("a", "b"):
        engine.add(name, [1, 2, 3], 8)
    outputs = engine.run()
    assert sorted(len(output.outputs[0].token_ids) for output in outputs) == [8, 8]
    kinds = "".join("L" if kind == "launch" else "o" for kind, _ in order)
    # the device has the next step while the host makes a step's outputs
    assert kinds.startswith("LLoLoLo") and kinds.count("L") == kinds.count("o") == 8


def test_an_abort_returns_what_there_is_and_its_id_is_free():
    engine = FakeEngine()
    engine.add("a", [1, 2, 3], 20)
    b = engine.add("b", [4, 5], 20)
    while not b.num_output_tokens:
        engine.core.step()
    (aborted,) = engine.core.abort(["a"])
    assert len(aborted.outputs[0].token_ids) == 1 and aborted.outputs[0].finish_reason == "abort"
    with pytest.raises(ValueError, match="Request id 'b' is in use"):
        engine.core.add_request(Request("b", [1], SamplingParams(max_tokens=1)), None)
    # tokens of the first one are still on their way
    engine.add("a", [1], 2)
    outputs = {output.request_id: len(output.outputs[0].token_ids) for output in engine.run()}
    assert outputs == {"a": 2, "b": 20}
