"""`jaxllm tune`: what it finds, against an exhaustive sweep; what it writes; and that nothing finished is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import yaml
from support.large_models import QWQ_32B
from support.linear_steps import LinearSteps
from support.own_process import found_by
from support.tiny_model import write_tiny_model
from tqdm import tqdm

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.autotuning import machine as turns
from jaxllm.autotuning import measure as measuring
from jaxllm.autotuning.capacity import Planner
from jaxllm.autotuning.forecast import Forecast
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.knob import Space
from jaxllm.autotuning.measure import MeasuredRun, measure, prompts_of
from jaxllm.autotuning.question import hash_of
from jaxllm.autotuning.search import Search
from jaxllm.autotuning.trials import Journal
from jaxllm.config.devices import gpu_named
from jaxllm.config.files import load_config
from jaxllm.entrypoints.cli import main
from jaxllm.entrypoints.tune import default_folder
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.workload import Workload, WorkloadRequest

#: a device whose steps take 1 ms, 20 us a token of the program and 50 ns a token that is attended to
STEPS = LinearSteps(fixed=1e-3, token=2e-5, context=5e-8, host=1e-4, host_request=1e-6)
#: engines without a model, which start at once
NULL: dict[str, Any] = {"load_format": "null", "skip_tokenizer_init": True, "max_model_len": 256}


#: values of what is not searched then
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,
    "block_size": 16,
    "long_prefill_token_threshold": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorded(model: Path) -> dict[str, Workload]:
    """Two workloads that an engine has recorded: a batch of many lengths, and prompts that begin alike."""
    draw = random.Random(0)
    tokens = lambda count: [draw.randrange(250) for _ in range(count)]  # noqa: E731
    mixed = [(tokens(draw.randrange(8, 160)), draw.randrange(2, 64)) for _ in range(32)]
    prefix = [tokens(96) for _ in range(3)]
    shared = [(prefix[i % 3] + tokens(24), 12) for i in range(30)]
    found = {}
    with LLM(model, **NULL, max_num_seqs=4, max_num_batched_tokens=128, block_size=16) as llm:
        for name, requests in {"mixed": mixed, "shared": shared}.items():
            with llm.trace() as trace:
                llm.generate(
                    [{"prompt_token_ids": ids} for ids, _ in requests],
                    [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in requests],
                    use_tqdm=False,
                )
            found[name] = Workload.of_trace(trace, source=name)
    # they come faster than few at a time can be answered
    late = (dataclasses.replace(each, arrival=0.004 * i) for i, each in enumerate(found["shared"].requests))
    found["shared"] = dataclasses.replace(found["shared"], requests=tuple(late))
    return found


class Kept(Forecast):
    """Runs are of no goals: one sweep serves all of them."""

    runs: ClassVar[dict[str, SimulatedRun]] = {}

    def run(self, arguments: Mapping[str, Any]) -> SimulatedRun:
        key = json.dumps([self.workload.source, arguments], sort_keys=True)
        if key not in self.runs:
            self.runs[key] = super().run(arguments)
        return self.runs[key]


@pytest.mark.parametrize("name", ["mixed", "shared"])
@pytest.mark.parametrize(
    ("objective", "limits"),
    [
        ("throughput", {"mixed": "p99 itl<6ms", "shared": "p99 ttft<400ms"}),
        ("latency", {"mixed": "throughput>900", "shared": "p99 ttft<400ms"}),
        ("goodput", {"mixed": "ttft<150ms, tpot<4ms", "shared": "ttft<150ms, p99 itl<8ms"}),
    ],
)
def test_it_finds_what_an_exhaustive_sweep_finds(
    model: Path, recorded: dict[str, Workload], name: str, objective: str, limits: dict[str, str]
):
    """Within 5% of the best of all combinations, with a fraction of them tried."""
    workload, goals = recorded[name], Goals.of(objective, limits[name])
    # 40 blocks of 16: requests are preempted, prefixes are evicted
    planner = Planner(model, {**NULL, "num_gpu_blocks_override": 40, "num_decode_steps": 1, "block_size": 16,
                              "kv_cache_dtype": "auto"})  # fmt: skip
    forecast = Kept(planner, workload, goals, lambda _: STEPS)
    space = Space.of(planner, workload)
    assert {knob.name for knob in space.knobs} >= {
        "max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold",
    }  # fmt: skip
    names = [knob.name for knob in space.knobs]
    combinations = itertools.product(*(knob.values for knob in space.knobs))
    swept = {
        json.dumps(arguments, sort_keys=True): forecast(arguments)
        for arguments in (space.arguments(dict(zip(names, values, strict=True))) for values in combinations)
    }
    numbers = [trial.numbers for trial in swept.values() if trial.numbers is not None]
    best, worst = min(numbers, key=goals.rank), max(numbers, key=goals.rank)
    journal = Journal(None, {})
    found = Search(space, goals, journal, forecast).run(16)
    assert found is not None and found.numbers is not None
    assert goals.excess(found.numbers) <= 0 and goals.excess(best) <= 0
    assert goals.gain(found.numbers, best) >= -0.05
    assert len(journal.trials) < len(swept) / 2
    # and it could have been missed
    assert goals.excess(worst) > 0 or goals.gain(worst, best) < -0.2


def test_what_makes_no_difference_is_left_at_its_default(model: Path):
    workload = requests_at(0.0, count=2, prompt=16, output=4)
    planner = Planner(model, NULL)
    goals = Goals.of("throughput")
    forecast = Forecast(planner, workload, goals, lambda _: STEPS)
    found = Search(Space.of(planner, workload), goals, Journal(None, {}), forecast).run(16)
    assert found is not None and "long_prefill_token_threshold" not in found.arguments
    assert "block_size" not in found.arguments and "max_num_seqs" not in found.arguments


def test_no_request_in_time_is_not_as_good_as_some(model: Path):
    """The defaults run all at once, each too slowly: what has a goodput is not given back for them."""
    workload = requests_at(0.0, count=16, prompt=48, output=32)
    fixed = {"block_size": 16, "long_prefill_token_threshold": 0, "max_num_batched_tokens": 256, "num_decode_steps": 1}
    planner = Planner(model, {**NULL, **fixed})
    goals = Goals.of("goodput", "tpot<1.25ms")
    forecast = Forecast(planner, workload, goals, lambda _: STEPS)
    found = Search(Space.of(planner, workload), goals, Journal(None, {}), forecast).run(8)
    base = forecast({}).numbers
    assert base is not None and base["goodput"] == 0
    assert found is not None and found.numbers is not None and found.numbers["goodput"] > 0
    assert found.arguments["max_num_seqs"] <= 8


def test_replicas_share_the_requests_at_a_time(model: Path, tmp_path: Path):
    workload = dataclasses.replace(requests_at(0.0, count=12, prompt=48, output=8), max_concurrency=3)
    planner = Planner(model / "config.json", {}, gpu=gpu_named("h100"), num_devices=2)
    run = Forecast(planner, workload, Goals.of("throughput"), lambda _: STEPS).run({"data_parallel_size": 2})
    assert run.num_requests == 12 and run.num_running.max() == 2 and run.num_running.min() == 1
    # and a number of replicas may be held fixed
    result = jaxllm.tune(
        model / "config.json", workload, device="h100", num_devices=2, data_parallel_size=2, num_trials=2,
        use_tqdm=False, **DEFAULTS,
    )  # fmt: skip
    assert result.arguments["data_parallel_size"] == 2 and result.best.numbers["throughput"] > 0
    # other traffic is another question
    assert len({hash_of(dataclasses.replace(workload, max_concurrency=limit)) for limit in (None, 3, 4)}) == 3
    with pytest.raises(ValidationError, match="cannot be made .*Give another --output"):
        jaxllm.tune(model, workload, output=model / "config.json", use_tqdm=False, **NULL)


def test_what_is_simulated_is_compared_with_defaults_that_are_simulated(model: Path):
    """The defaults are measured, to learn from, and are not what a simulation is better than."""
    workload = requests_at(0.0, count=16, prompt=48, output=16)
    # what nothing keeps has whatever comes nearest, and no setting for the sake of being simple
    result = jaxllm.tune(
        model, workload, constraints="max e2e<1us", num_trials=8, num_measured=0, use_tqdm=False, **NULL
    )
    simulated = {trial.key: trial.numbers for trial in result.trials if trial.kind == "simulated"}
    assert [trial.kind for trial in result.trials if trial.kind != "simulated"] == ["calibrated"]
    assert result.best.arguments
    assert not result.is_measured and result.base.numbers == simulated["{}"]
    assert f"With the engine's defaults, simulated: {result.goals.text(result.base.numbers)}" in result.to_yaml()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("meta-llama/Llama-3.2-1B", "tune-Llama-3.2-1B"),
        ("models/Qwen2.5-7B/config.json", "tune-Qwen2.5-7B"),
        ("q4.5.gguf", "tune-q4.5"),
        ("models/a/..", "tune-models"),
    ],
)
def test_each_model_has_a_folder_of_its_own(name: str, folder: str):
    assert default_folder(name) == Path(folder)


def requests_at(gap: float, *, count: int, prompt: int, output: int) -> Workload:
    rows = (WorkloadRequest(arrival=i * gap, num_prompt_tokens=prompt, num_output_tokens=output) for i in range(count))
    return Workload(requests=tuple(rows), source="some")


def test_the_space_is_what_the_platform_can_have(model: Path):
    workload = requests_at(0.0, count=40, prompt=100, output=20)
    space = Space.of(Planner(model, {**NULL, "max_num_seqs": 8}), workload)
    assert space.left["max_num_seqs"] == "you hold it fixed" and "one device" in space.left["parallelism"]
    assert "holds the whole workload" in space.left["kv_cache_dtype"]
    assert {"gpu_memory_utilization", "max_num_partial_prefills"} <= space.left.keys()
    long = Space.of(Planner(model, {key: value for key, value in NULL.items() if key != "max_model_len"}), workload)
    lengths = next(knob for knob in long.knobs if knob.name == "max_model_len")
    assert min(lengths.values) == 128 and lengths.default > 128
    slowly = Space.of(Planner(model, NULL), requests_at(1.0, count=4, prompt=100, output=20))
    assert "streamed" in slowly.left["num_decode_steps"]
    tight = Space.of(Planner(model, {**NULL, "num_gpu_blocks_override": 8}), workload)
    assert "kv_cache_dtype" in {knob.name for knob in tight.knobs}


def test_drafts_are_measured_where_there_are_real_prompts(model: Path):
    """The simulator does not know which are right; lengths alone say nothing of it."""
    prompts = Workload.of_prompts([[5, 6, 7] * 20] * 6, [40] * 6, source="prompts")
    planner = Planner(model, NULL)
    space = Space.of(planner, prompts)
    (drafts,) = space.measured
    assert drafts.name == "speculative_config" and "speculative_config" not in space.left
    arguments = space.arguments({drafts.name: drafts.values[1], "max_num_seqs": 4})
    assert arguments == {"speculative_config": drafts.values[1], "max_num_seqs": 4}
    assert space.values(arguments)[drafts.name] == drafts.values[1]
    result = jaxllm.tune(model, prompts, num_trials=4, num_measured=1, rounds=1, use_tqdm=False, **NULL)
    assert any("speculative_config" in trial.arguments for trial in result.trials if trial.kind == "measured")
    assert "speculative_config" in Space.of(planner, requests_at(0.0, count=6, prompt=60, output=40)).left


def test_a_report_tells_of_engines_that_were_not_measured(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Drafts, which are not simulated, have no numbers where their engine is refused, or Ctrl-C comes before it."""
    prompts = Workload.of_prompts([[5, 6, 7] * 20] * 6, [40] * 6, source="prompts")
    options: dict[str, Any] = {"num_trials": 4, "num_measured": 1, "rounds": 1, "use_tqdm": False, **NULL}
    refused = jaxllm.tune(model, prompts, output=tmp_path, enforce_eager=True, **options)
    assert not refused.interrupted and any(not each.numbers for each in refused.finalists)
    assert "programs that check drafts are not among" in (tmp_path / "report.html").read_text()
    counted(monkeypatch, stop_after=1)
    stopped = jaxllm.tune(model, prompts, **options)
    assert stopped.interrupted and any(not each.numbers for each in stopped.finalists)
    assert "not simulated" in stopped._repr_html_()


def counted(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[dict[str, Any]]:
    """The arguments of each engine that is measured from here on; Ctrl-C comes instead of one more."""
    calls: list[dict[str, Any]] = []

    def counting(model: Any, arguments: Mapping[str, Any], workload: Workload, **options: Any) -> MeasuredRun:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(dict(arguments))
        return measured_once(known, model, arguments, workload, **options)

    known: dict[str, MeasuredRun] = {}
    monkeypatch.setattr(turns, "measure", counting)
    return calls


def measured_once(
    known: dict[str, MeasuredRun], model: Any, arguments: Mapping[str, Any], workload: Workload, **options: Any
) -> MeasuredRun:
    """Later rounds of a setting are as its first one, which takes an engine's start each."""
    key = json.dumps([arguments, options], sort_keys=True, default=str)
    if key not in known:
        known[key] = measure(model, arguments, workload, **options)
    return known[key]


def test_it_measures_writes_and_goes_on_after_an_interrupt(
    model: Path, recorded: dict[str, Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workload = dataclasses.replace(recorded["mixed"], requests=recorded["mixed"].requests[:12])
    bars = []

    class Bar(tqdm):
        def __init__(self, **given: Any) -> None:
            bars.append(given["desc"])
            super().__init__(**{**given, "disable": True})

    options: dict[str, Any] = {
        "output": tmp_path / "out", "num_trials": 12, "num_measured": 2, "rounds": 2, "use_tqdm": Bar, **NULL,
    }  # fmt: skip
    first = counted(monkeypatch, stop_after=2)
    stopped = jaxllm.tune(model, workload, constraints="p99 ttft<1min", **options)
    assert stopped.interrupted and len(first) == 2 and "interrupted" in stopped.to_yaml()
    assert load_config(tmp_path / "out" / "config.yaml")["model"] == str(model)
    kept = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    # what a kill leaves of a line is done again
    (tmp_path / "out" / "trials.jsonl").write_text("\n".join(kept) + '\n{"kind": "meas')
    second = counted(monkeypatch)
    result = jaxllm.tune(model, workload, constraints="p99 ttft<1min", **options)
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert trials[: len(kept)] == [json.loads(line) for line in kept] and not result.interrupted
    runs = [(trial["kind"], json.dumps(trial["arguments"]), trial["round"]) for trial in trials[1:]]
    # nothing is done twice but the round that was interrupted, whose halves would not have run beside each other
    assert [run for run in runs if runs.count(run) > 1] == [("measured", "{}", 1)] * 2
    assert sum(kind != "simulated" for kind, _, _ in runs) == len(first) + len(second)
    # once more, and everything is there
    third = counted(monkeypatch)
    again = jaxllm.tune(model, workload, constraints="p99 ttft<1min", **options)
    assert third == [] and again.best == result.best

    assert {"Measuring defaults", "Simulating", "Measuring the best"} <= set(bars)
    assert result.is_measured and result.feasible and len(result.best.measured) >= 2
    assert result.arguments["max_model_len"] == 256 and "off for the others" in result.uncertainty
    config = load_config(tmp_path / "out" / "config.yaml")
    assert config == {"model": str(model), **result.arguments}
    with LLM(**config) as llm:
        assert llm.engine.args.max_num_seqs == config.get("max_num_seqs", llm.engine.args.max_num_seqs)
    text = (tmp_path / "out" / "config.yaml").read_text()
    for effect in result.effects:
        assert re.search(rf"# Effect: [^\n]*(\n#[^\n]*)*\n{effect.knob.name}: ", text)
    check_page((tmp_path / "out" / "report.html").read_text(), result)
    assert "<svg" in result._repr_html_() and str(result).startswith(f"{model} on ")
    with pytest.raises(ValidationError, match="another question .constraints: .*Give another --output"):
        jaxllm.tune(model, workload, constraints="p99 ttft<2min", **options)
    (tmp_path / "out" / "trials.jsonl").write_text("something else\n")
    with pytest.raises(ValidationError, match="is not a file of trials"):
        jaxllm.tune(model, workload, constraints="p99 ttft<1min", **options)


def test_the_same_question_again_has_the_same_answer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where what was the fastest of the first rounds is not the fastest of all."""
    calls: list[str] = []

    def machine(model: Any, arguments: Mapping[str, Any], workload: Workload, **options: Any) -> MeasuredRun:
        """More settings are faster at first, and fewer in later rounds."""
        found = measure(model, arguments, workload, **options)
        key = json.dumps(dict(arguments), sort_keys=True)
        seconds = 2.6 if dict(arguments) == NULL else (1.4 + 0.01 * len(arguments)) if key in calls else 2.0
        seconds -= 0.05 * len(arguments) * (key not in calls)
        calls.append(key)
        none = np.zeros(found.run.num_requests)
        run = dataclasses.replace(found.run, arrivals=none, firsts=none + seconds / 2, lasts=none + seconds)
        return dataclasses.replace(found, run=run)

    monkeypatch.setattr(turns, "measure", machine)
    prompts = Workload.of_prompts([[5, 6, 7] * 20] * 6, [40] * 6, source="prompts")
    options: dict[str, Any] = {"num_trials": 8, "num_measured": 1, "rounds": 1, "use_tqdm": False, **NULL}
    question: Any = {"constraints": "max e2e<1us", "output": tmp_path, **options}
    first = jaxllm.tune(model, prompts, **question)
    assert max(map(calls.count, calls)) > 2 and first.best.arguments
    number = len(calls)
    again = jaxllm.tune(model, prompts, **question)
    assert len(calls) == number and again.best == first.best and again.finalists == first.finalists


def drifting(monkeypatch: pytest.MonkeyPatch, gain: float, noise: float) -> None:
    """A machine that is half as fast in some minutes as in others, the first of which has the calibration; whatever is
    no default is faster by so much, and single runs differ by some noise.
    """
    draw, minute = random.Random(5), 0
    known: dict[str, MeasuredRun] = {}

    def machine(model: Any, arguments: Mapping[str, Any], workload: Workload, **options: Any) -> MeasuredRun:
        nonlocal minute
        found = measured_once(known, model, arguments, workload, **options)
        minute += 1
        slow = 2.0 if options else 1.0 + 0.4 * (minute // 4 % 2)
        seconds = slow * math.exp(draw.gauss(0.0, noise)) / (1.0 if dict(arguments) == NULL else 1.0 + gain)
        none = np.zeros(found.run.num_requests)
        run = dataclasses.replace(found.run, arrivals=none, firsts=none + seconds / 2, lasts=none + seconds)
        return dataclasses.replace(found, run=run)

    monkeypatch.setattr(turns, "measure", machine)


@pytest.mark.parametrize(("gain", "noise"), [(0.0, 0.05), (0.2, 0.02)])
def test_a_gain_is_what_rounds_show_beyond_their_noise(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, noise: float
):
    """The calibration in a slow minute makes nothing faster; what is faster is told with its bounds."""
    drifting(monkeypatch, gain, noise)
    workload = requests_at(0.0, count=24, prompt=48, output=16)
    result = jaxllm.tune(model, workload, output=tmp_path, num_trials=8, num_measured=2, use_tqdm=False, **NULL)
    config, text = (tmp_path / "config.yaml").read_text(), str(result)
    rounds = {trial.round for trial in result.trials if trial.kind == "measured" and not trial.arguments}
    assert rounds == {trial.round for trial in result.trials if trial.kind == "measured"}
    assert len([each for each in result.finalists if each.measured]) > 1
    if not gain:
        assert result.best.arguments == {} and result.gain == 0.0 and not result.effects
        assert load_config(tmp_path / "config.yaml") == {"model": str(model), **NULL}
        for each in (config, text):
            assert "the rounds show no gain of more than 0.5% by anything else" in " ".join(
                each.replace("#", "").split()
            )
        return
    told = result.best.gain
    assert told is not None and result.best.arguments and told.low < gain < told.high and told.is_shown
    assert len(result.best.measured) == len(result.base.measured) == len(told.values) >= 3
    assert told.text() in text and result.to_dict()["best"]["gain"]["shown"]
    assert told.text() in (tmp_path / "report.html").read_text()


def test_those_that_are_close_are_measured_until_it_is_clear(monkeypatch: pytest.MonkeyPatch):
    """A machine on which the fastest setting has slow minutes at first."""
    seconds, calls = {8: 1.0, 16: 0.9, 32: 1.5}, list[int]()
    minutes = itertools.repeat(1.0)

    def machine(model: Any, arguments: Mapping[str, Any], workload: Workload) -> MeasuredRun:
        calls.append(number := arguments["max_num_seqs"])
        none, count = np.zeros(1), np.ones(1, int)
        took = none + seconds[number] * (next(minutes) if number == 16 else 1.0)
        run = SimulatedRun(
            arrivals=none, firsts=took / 2, lasts=took, prompt_lengths=count, output_lengths=4 * count, itl=none[:0],
            preemptions=0, cached_tokens=0, times=none, kv_cache_usage=none, num_running=count, num_waiting=count,
        )  # fmt: skip
        return MeasuredRun(run=run, trace=cast("Any", None), plan=cast("Any", None))

    monkeypatch.setattr(turns, "measure", machine)
    race = turns.Machine(
        planner=cast("Any", SimpleNamespace(model="some", fixed={})), goals=Goals.of("latency"), folder=None,
        workload=requests_at(0.0, count=1, prompt=8, output=4), journal=Journal(None, {}), show=False,
    ).race  # fmt: skip
    settings = [{"max_num_seqs": number} for number in seconds]
    best, after = race(settings, 1, 3, "some")
    assert best.arguments == {"max_num_seqs": 16} and after == 10
    # what is told at once is not measured again, and each round goes the other way
    assert calls == [8, 16, 32, 32, 16, 8, 8, 16, 32]
    calls.clear()
    minutes = iter([1.25, 1.0, 1.2, 1.0, 0.95, *[1.0] * 4])
    best, after = race(settings, after, 3, "some")
    assert best.arguments == {"max_num_seqs": 16} and after == 19
    assert (calls.count(8), calls.count(16), calls.count(32)) == (9, 9, 3)


def test_a_device_that_is_not_there(model: Path, tmp_path: Path):
    """Plan and simulator alone; each value has its reason and its effect, and how uncertain that is is said."""
    draw = random.Random(1)
    rows = tuple(
        WorkloadRequest(arrival=0.0, num_prompt_tokens=draw.choice([500, 1000, 1500]), num_output_tokens=60)
        for _ in range(24)
    )
    (tmp_path / "config.json").write_text(json.dumps(QWQ_32B))
    result = jaxllm.tune(
        tmp_path / "config.json", Workload(requests=rows, source="some"), device="H100", num_devices=2,
        constraints="p99 itl<200ms", num_trials=16, max_num_seqs=24, output=tmp_path / "out", use_tqdm=False,
    )  # fmt: skip
    assert not result.is_measured and result.feasible and "Nothing was measured" in result.uncertainty
    assert result.arguments["max_num_seqs"] == 24
    assert "pipelines are not simulated" in result.space.left["pipeline_parallel_size"]
    assert {"parallelism", "gpu_memory_utilization"} <= {
        knob.name for knob in result.space.knobs
    } | result.space.left.keys()
    assert result.effects and "tensor_parallel_size" in result.arguments
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert load_config(tmp_path / "out" / "config.yaml") == {"model": result.model, **result.arguments}
    for effect in result.effects:
        for name in effect.knob.arguments(effect.value):
            assert re.search(rf"# Why: [^\n]*(\n# [^\n]*)*\n# Effect: [^\n]*(\n#[^\n]*)*(\n\w+: .*)*\n{name}: ", text)
    check_page((tmp_path / "out" / "report.html").read_text(), result)
    # one card does not hold four times as many at once
    fixed = {"max_model_len": 2048, "tensor_parallel_size": 1}
    tight = Space.of(Planner(tmp_path / "config.json", fixed, gpu=gpu_named("h100")), Workload(requests=rows * 4))
    assert {"gpu_memory_utilization", "kv_cache_dtype"} <= {knob.name for knob in tight.knobs}
    split = Planner(tmp_path / "config.json", {**fixed, "tensor_parallel_size": 4}, gpu=gpu_named("l4"))
    assert split.num_devices == 4 and split.capacity({}).plan.tensor_parallel_size == 4
    # on one card the model's own length does not fit beside the weights, and the workload's does
    alone = jaxllm.tune(
        tmp_path / "config.json", Workload(requests=rows[:4], source="few"), device="h100", num_devices=1,
        num_trials=2, use_tqdm=False, **DEFAULTS,
    )  # fmt: skip
    assert alone.arguments["max_model_len"] == 1664 and "tensor_parallel_size" not in alone.arguments
    assert "does not fit" in alone.space.left["max_model_len"] and alone.space.left["block_size"] == "you hold it fixed"


def check_page(page: str, result: jaxllm.TuningResult) -> None:
    """It has its plots in it, and asks for nothing from elsewhere."""
    assert page.count("<svg") == 1 + len(result.space.knobs) and "polyline" in page
    assert not re.search(r"""(src|href)=|https?://(?!www\.w3\.org)|@import|url\(""", page)
    for knob in result.space.knobs:
        assert f"<figcaption>{knob.name}</figcaption>" in page


def test_nothing_keeps_the_constraint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = ({"input_length": 60, "output_length": 8, "arrival_s": 0.0} for _ in range(10))
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["tune", str(model), "--workload", str(tmp_path / "w.jsonl"), "--constraint", "p99 ttft<1us",
             "--num-trials", "8", "--num-measured", "0", "--output", str(tmp_path / "out"), "--load-format", "null",
             "--skip-tokenizer-init", "--max-model-len", "128"]  # fmt: skip
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "Nothing that was tried keeps p99 ttft<" in out and "The nearest: " in out
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["max_model_len"] == 128 and "Nothing that was tried" in (tmp_path / "out" / "report.html").read_text()
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["feasible"] is False
    assert main(["tune", str(model), "--max-model-len", "128"]) == 1
    assert "the best settings are those of a workload: give --workload FILE" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_command_on_a_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Steps of every size calibrate the simulator, and engines with weights are measured."""
    words = ["tune", str(model), "--dataset-name", "random", "--num-prompts", "6", "--input-len", "24", "--output-len",
             "6", "--num-trials", "6", "--num-measured", "1", "--rounds", "1", "--output", str(tmp_path / "out"),
             "--skip-tokenizer-init", "--max-model-len", "64", "--max-num-batched-tokens", "64", "--block-size", "16",
             "--kv-cache-dtype", "auto", "--num-decode-steps", "1", "--enforce-eager"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "best, measured: " in out and "config.yaml (--config takes it)" in out
    steps = json.loads((tmp_path / "out" / "defaults.steps.json").read_text())["steps"]
    assert len({step["bucket_tokens"] for step in steps}) > 1
    assert load_config(tmp_path / "out" / "config.yaml")["enforce_eager"] is True


@pytest.mark.thorough
def test_a_model_is_spread_over_the_devices_that_there_are(tmp_path: Path):
    """Splits and replicas are simulated, with steps that were measured with so many; stages and drafts are measured."""
    found = found_by("support.tuned_devices", tmp_path)
    spread = ["one device", "data_parallel_size=2", "tensor_parallel_size=2"]
    assert sorted(found["searched"]["parallelism"]) == sorted(spread)
    assert found["searched"]["pipeline_parallel_size"] == ["1", "2"]
    for name in ("data_parallel_size", "tensor_parallel_size"):
        assert {name: 2} in found["simulated"]
    for each in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        assert each in found["measured"]
    assert yaml.safe_load(found["config"]).keys() >= found["arguments"].keys()


def test_bad_questions(model: Path, monkeypatch: pytest.MonkeyPatch):
    workload = requests_at(0.0, count=4, prompt=100, output=20)
    with pytest.raises(ValidationError, match="max_model_len=64 is held fixed.* at least 120"):
        jaxllm.tune(model, workload, **{**NULL, "max_model_len": 64})
    with pytest.raises(ValidationError, match="a request of 100020 tokens, and the model knows contexts of up to"):
        jaxllm.tune(model, requests_at(0.0, count=1, prompt=100_000, output=20), skip_tokenizer_init=True)
    with pytest.raises(ValidationError, match="num_devices=2 is for a device that is not there"):
        jaxllm.tune(model, workload, num_devices=2)
    with pytest.raises(ValidationError, match="'h1000' is not a device that jaxllm knows.*'h100'"):
        jaxllm.tune(model, workload, device="h1000")
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    with pytest.raises(
        ValidationError, match="speculative_config=.* is held fixed, and is not simulated. Leave it out"
    ):
        jaxllm.tune(model, workload, **NULL, speculative_config=drafts)
    with pytest.raises(ValidationError, match="rounds must be at least 1, got 0"):
        jaxllm.tune(model, workload, **NULL, rounds=0)
    with pytest.raises(TypeError, match="workload must be a Workload"):
        jaxllm.tune(model, 3)  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValidationError, match=r"searches with Optuna.*pip install"):
        jaxllm.tune(model, workload, **NULL)


def test_prompts_share_what_the_workload_says(recorded: dict[str, Workload]):
    ids = list(range(200))
    prompts = list(prompts_of(recorded["shared"], ids))
    assert [len(prompt) for prompt in prompts] == [120] * 30 and max(map(max, prompts)) < 200
    assert prompts[0][:96] == prompts[3][:96] != prompts[1][:96] and prompts[0][96:] != prompts[3][96:]
    own = Workload.of_prompts([[5, 6, 7] * 9, [5, 6, 7] * 5], [4, 4])
    assert list(prompts_of(own, ids)) == [[5, 6, 7] * 9, [5, 6, 7] * 5]


def test_prompts_are_of_the_models_vocabulary(tmp_path: Path):
    """Tokenizers may know more, such as the mark of pictures of a model's larger kin."""
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    options = {"load_format": "null", "max_model_len": 256}
    found = measure(folder, options, requests_at(0.0, count=4, prompt=100, output=4))
    assert found.run.num_requests == 4


def test_requests_come_when_they_come(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Arrivals are kept, and a request that came during a step has waited since."""
    monkeypatch.setattr(measuring, "streams", lambda _: True)
    found = measure(model, NULL, requests_at(0.05, count=5, prompt=20, output=6))
    np.testing.assert_allclose(np.diff(found.run.arrivals), 0.05)
    assert found.run.num_requests == 5 and len(found.run.itl) == 5 * 5
    assert (found.run.ttft > 0).all() and found.run.seconds >= 0.2
    assert found.plan.max_model_len == 256
