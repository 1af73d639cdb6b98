"""The simulator against the engine itself, over a device that takes time on a clock of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_model import SMALL, write_tiny_model
from support.virtual_time import VirtualTime
from test_advice import ROOMY, prompts

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.step_shape import StepShape
from jaxllm.engine.observe.trace import RequestRecord, Trace
from jaxllm.engine.step import SchedulerOutput
from jaxllm.entrypoints.cli import main
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.forecasts import on_engine
from jaxllm.tuning.simulation.measure import measure_steps
from jaxllm.tuning.simulation.replay import replay
from jaxllm.tuning.simulation.workload import Workload


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def run(model: Path, given: list[list[int]], **arguments: Any) -> Trace:
    """A trace of requests that come together, where steps take 1 ms and 20 us a token of their programs."""
    with LLM(model, **{**ROOMY, **arguments}) as llm:
        bucket = llm.engine.runner.bucket

        def seconds(step: SchedulerOutput) -> float:
            tokens = step.step_sizes()[0]
            return step.num_steps * (1e-3 + 2e-5 * bucket(tokens, min(tokens, len(step.rows)))[0])

        clock = VirtualTime(llm, seconds)
        params = [SamplingParams(max_tokens=8 + 5 * (i % 4), ignore_eos=True) for i in range(len(given))]
        with clock.trace() as trace:
            llm.generate([{"prompt_token_ids": ids} for ids in given], params, use_tqdm=False)
    return trace


def throughput(trace: Trace) -> float:
    """Output tokens a second on the device's clock."""
    end = max(step.device_start + step.device_time for step in trace.steps)
    return sum(request.num_output_tokens for request in trace.requests) / end


SHARED = [[*prompts(1, 64, seed=5)[0], *end] for end in prompts(16, 20)]


@pytest.mark.parametrize(
    ("given", "recorded", "changes"),
    [
        (prompts(24, 40), {"max_num_seqs": 4}, {"max_num_seqs": 12}),
        (prompts(24, 40), {"num_gpu_blocks_override": 200}, {"num_gpu_blocks_override": 60}),
        (prompts(16, 100), {"max_num_batched_tokens": 64}, {"max_num_batched_tokens": 256}),
        (SHARED, {"max_num_seqs": 4}, {"enable_prefix_caching": False}),
        (prompts(8, 30), {"max_num_seqs": 8}, {"num_decode_steps": 8}),
        (prompts(8, 30), {"max_num_seqs": 8}, {"async_scheduling": False}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_foresees_what_the_engine_does(
    model: Path, given: list[list[int]], recorded: dict[str, Any], changes: dict[str, Any]
):
    """Steps, preemptions, hits and throughput of other settings, from a trace of the recorded ones."""
    trace = run(model, given, **recorded)
    # arrivals are on the host's clock, which stands still for the device
    trace.requests = at_once(trace)
    found = replay(trace, changes)
    assert found.runs["simulated"].throughput == pytest.approx(throughput(trace), rel=0.02)
    truth = run(model, given, **{**recorded, **changes})
    assert found.simulated.throughput == pytest.approx(throughput(truth), rel=0.02)
    assert found.simulated.preemptions == sum(step.num_preemptions for step in truth.steps)
    assert found.simulated.cached_tokens == sum(request.num_cached_tokens for request in truth.requests)
    assert found.simulated.num_requests == len(given)
    np.testing.assert_allclose(found.simulated.kv_cache_usage.max(), max(step.kv_cache_usage for step in truth.steps))
    assert "error" in str(found) and len(found.to_dict()["runs"]) == 3
    assert "throughput" in found.errors


def at_once(trace: Trace) -> list[RequestRecord]:
    """The requests in the order in which they came."""
    ordered = sorted(trace.requests, key=lambda request: int(request.request_id))
    return [dataclasses.replace(request, queued=0.0) for request in ordered]


def test_the_model_of_steps_is_found_again(model: Path):
    trace = run(model, prompts(24, 40), max_num_seqs=12)
    found = replay(trace, {}).step_times
    for tokens in (1, 8, 16):
        shape = StepShape(tokens, 8, 8, 400, 0)
        assert found.device_seconds(shape) == pytest.approx(1e-3 + 2e-5 * tokens, rel=0.05)


@pytest.mark.parametrize(("quantization", "size"), [("int8", 4), (None, 8)])
def test_quantized_weights_have_a_program_of_four_rows(model: Path, quantization: str | None, size: int):
    trace = run(model, prompts(6, 40), max_num_seqs=3, quantization=quantization, enforce_eager=False)
    steps = trace.arrays()
    decoding = (steps["num_prefill_tokens"] == 0) & (steps["num_seqs"] > 1) & (steps["num_steps"] == 1)
    assert decoding.any() and set(steps["bucket_tokens"][decoding]) == {size}
    # another number of requests has the same programs, in the simulator as well
    other = run(model, prompts(6, 40), max_num_seqs=2, quantization=quantization, enforce_eager=False)
    found = replay(trace, {"max_num_seqs": 2}).simulated
    assert found.throughput == pytest.approx(throughput(other), rel=0.03)


def test_steps_that_tell_nothing_apart_are_said_to(model: Path):
    """Eight requests at once from beginning to end: what a step takes grows with what is in the cache alone."""
    trace = run(model, prompts(24, 40), max_num_seqs=12)
    assert "expect anything" not in str(FittedSteps.of(trace.arrays()))
    steps = trace.arrays()
    alike = {name: np.repeat(values[-1:], 32, axis=0) for name, values in steps.items()}
    alike["decode_context"] = 8 * np.arange(1, 33)
    alike["device_time"] = 1e-3 * np.arange(1, 33)
    assert "expect anything" in str(FittedSteps.of(alike))


def test_what_is_not_simulated_is_refused(model: Path):
    trace = run(model, prompts(8, 30), max_num_seqs=4)
    bad: Callable[..., Any] = lambda **changes: replay(trace, changes)  # noqa: E731
    with pytest.raises(ValidationError, match="tokenizer is not simulated"):
        bad(tokenizer="other")
    with pytest.raises(ValidationError, match="speculative_config is not simulated"):
        bad(num_speculative_tokens=3)
    with pytest.raises(ValidationError, match="max_num_batched_tokens=2 is less than max_num_seqs=4"):
        bad(max_num_batched_tokens=2)
    with pytest.raises(ValidationError, match="no engine has these settings: .* without chunked prefill"):
        bad(enable_chunked_prefill=False, max_num_batched_tokens=4)
    with pytest.raises(ValidationError, match="no engine has these settings: num_blocks must be at least 2"):
        bad(num_gpu_blocks_override=1)
    with pytest.raises(ValidationError, match="hold no request of max_model_len=.*, so no engine starts with them"):
        bad(num_gpu_blocks_override=2)
    own = trace.settings
    assert own is not None
    trace.settings = dataclasses.replace(own, enable_prefix_caching=False)
    assert len(bad(enable_prefix_caching=False).runs) == 3
    with pytest.raises(ValidationError, match="enable_prefix_caching cannot be switched on"):
        bad(enable_prefix_caching=True)
    trace.requests.clear()
    with pytest.raises(ValidationError, match="has no requests"):
        bad()


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(model, prompts(8, 30), max_num_seqs=4).save(tmp_path / "trace.json")
    assert main(["simulate", str(tmp_path / "trace.json"), "--max-num-seqs", "8", "--no-async-scheduling"]) == 0
    out = capsys.readouterr().out
    assert "max_num_seqs=8, async_scheduling=False" in out and "output tokens/s" in out and "error" in out
    assert main(["simulate", str(tmp_path / "trace.json"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == ["measured", "simulated"]
    other = ["simulate", "--steps-of", str(tmp_path / "trace.json"), "--num-prompts", "9", "--input-len", "20"]
    figure = str(tmp_path / "figure.svg")
    assert main([*other, "--output-len", "5", "--max-num-batched-tokens", "64", "--plot", figure]) == 0
    assert "9 requests at once, 180 prompt tokens" in capsys.readouterr().out
    assert "<svg" in Path(figure).read_text()
    for words, message in (
        (["simulate", "--num-prompts", "9"], "how long do steps take? Give --measure"),
        ([*other, "--measure"], "--measure and --steps-of both say how long steps take"),
        ([*other, "--plot", "figure.txt"], "a figure is a .png, .svg, .pdf file"),
        (["simulate", str(tmp_path / "trace.json"), "--input-len", "5"], "--input-len is for datasets"),
        ([*other, "--compiler"], "--compiler plans the memory of --device"),
        ([*other, "--max-loras", "2"], "max_loras is not simulated"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_a_running_engine_is_measured(model: Path, monkeypatch: pytest.MonkeyPatch):
    """What its steps take is found, of steps that it has run and of others; on a machine, the error is of a run that
    the steps were not fitted to, and how large it is, the machine decides, too.
    """

    def law(shape: StepShape) -> float:
        return 1e-3 + 2e-5 * shape.num_tokens + 2e-6 * shape.decode_context + 1e-6 * shape.chunk_pairs

    with LLM(model, **SMALL, num_gpu_blocks_override=64) as llm:
        (core,) = llm.engine.core.cores
        runner: Any = core._runner
        bucket, execute = llm.engine.runner.bucket, runner.execute

        def of(step: SchedulerOutput) -> float:
            return law(StepShape.of(step, bucket(step.num_tokens, len(step.rows))[0]))

        with monkeypatch.context() as patch:
            patch.setattr(llm, "trace", VirtualTime(llm, of).trace)
            steps = measure_steps(llm, rounds=1)
        # decoding, reading, and both in one step
        for shape in (StepShape(32, 4, 4, 400, 0), StepShape(32, 1, 0, 0, 900), StepShape(32, 3, 2, 60, 300)):
            assert steps.device_seconds(shape) == pytest.approx(law(shape), rel=0.03)

        def slowly(step: SchedulerOutput) -> Any:
            time.sleep(2e-3 + 1e-4 * step.num_tokens)
            return execute(step)

        runner.execute = slowly
        found = on_engine(llm, Workload.of_prompts(prompts(20, 30), [6] * 20), {"max_num_seqs": 2})
    assert found.simulated.num_requests == 20 and found.simulated.num_running.max() == 2
    assert set(found.errors) > {"throughput", "ttft_p50"} and "12 other requests, which were measured" in str(found)
    assert np.isfinite(list(found.errors.values())).all()


def test_how_far_off_it_is_is_measured_in_parts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A part of the grid that the file has is kept, and not measured again."""
    file = tmp_path / "errors.json"
    words = ["bench", "simulate", "--model", str(model), "--num-prompts", "4", "--num-iters", "1", "--max-model-len",
             "256", "--enforce-eager", "--block-size", "16", "--output-json", str(file)]  # fmt: skip
    part = ["--workloads", "decode", "--num-seqs", "2", "--num-batched-tokens", "32"]
    assert main([*words, *part]) == 0
    first = json.loads(file.read_text())["rows"]
    assert [row["workload"] for row in first] == ["decode"] and set(first[0]["measured"]) == {"throughput", "ttft_p50"}
    assert main([*words, "--workloads", "decode", "prefill", "--num-seqs", "2", "--num-batched-tokens", "32"]) == 0
    found = json.loads(file.read_text())
    assert found["rows"][0] == first[0] and [row["workload"] for row in found["rows"]] == ["decode", "prefill"]
    errors = [abs(row["from steps"]["throughput"]) for row in found["rows"]]
    assert found["summary"]["throughput"]["worst"] == max(errors)
    assert "of 2 within 10%" in capsys.readouterr().out
    assert main([*words, *part, "--seed", "1"]) == 1
    assert "was measured with seed=" in capsys.readouterr().err
    assert main([*words, *part[:-1], "32", "64"]) == 1
    assert "--num-batched-tokens has 2 values and --num-seqs 1" in capsys.readouterr().err
