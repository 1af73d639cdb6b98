"""Traces: their numbers against what the device was really given, their files against the format's rules."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_engine import FakeEngine

from jaxllm.engine.observe.chrome_trace import events
from jaxllm.engine.observe.stage_record import stage_records
from jaxllm.engine.observe.trace import RequestRecord, StepRecord, Trace
from jaxllm.engine.observe.trace_recorder import TraceRecorder
from jaxllm.engine.scheduling.step_updates import StepUpdates
from jaxllm.engine.step import SchedulerOutput


class Traced(FakeEngine):
    """A fake engine that writes down, on the device's side, what every step computes."""

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)
        #: step -> (tokens, sequences, {request id: (first position, tokens)})
        self.steps: dict[int, tuple[int, int, dict[str, tuple[int, int]]]] = {}
        execute = self.device.execute

        def wrapped(scheduled: SchedulerOutput) -> Any:
            requests, starts, counts = scheduled.requests, scheduled.starts, scheduled.counts
            entries = {r.request_id: (s, n) for r, s, n in zip(requests, starts, counts, strict=True)}
            self.steps[scheduled.step] = (sum(counts), len(scheduled.rows), entries)
            return execute(scheduled)

        self.device.execute = wrapped
        self.recorders: list[TraceRecorder] = []

    def trace(self, **options: Any) -> Trace:
        def attach(trace: Trace) -> None:
            self.recorders.append(TraceRecorder(trace, self.core.scheduler, **options))
            self.core.observe(self.recorders[-1])

        def detach(trace: Trace) -> None:
            for recorder in self.recorders:
                self.core.stop_observing(recorder)
                recorder.close()
            self.recorders.clear()

        return Trace(attach, detach)


PROMPTS = {"a": 9, "b": 30, "c": 1, "d": 17, "e": 5}


def run(engine: Traced, **options: Any) -> Trace:
    with engine.trace(**options) as trace:
        for number, (name, length) in enumerate(PROMPTS.items()):
            engine.add(name, [(number + i) % 11 for i in range(length)], 10 + number)
        engine.run()
    return trace


@pytest.fixture
def preempting() -> tuple[Traced, Trace]:
    engine = Traced(num_blocks=9)
    return engine, run(engine)


def test_without_preemptions_the_tokens_are_the_requests():
    engine = Traced()
    trace = run(engine)
    assert sum(step.num_prefill_tokens for step in trace.steps) == sum(PROMPTS.values())
    # the last token of a request is sampled, but never computed; the first one comes with the prompt
    assert sum(step.num_decode_tokens for step in trace.steps) == sum(9 + i for i in range(len(PROMPTS)))
    assert not any(step.num_preemptions for step in trace.steps)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in sorted(trace.requests, key=lambda r: r.request_id)] == [
        (length, 10 + i) for i, length in enumerate(PROMPTS.values())
    ]


def test_steps_are_what_the_device_was_given(preempting: tuple[Traced, Trace]):
    engine, trace = preempting
    assert [step.step for step in trace.steps] == sorted(engine.steps)
    for step in trace.steps:
        tokens, seqs, entries = engine.steps[step.step]
        prefill = sum(count for name, (start, count) in entries.items() if count > 1 or start < PROMPTS[name])
        assert (step.num_tokens, step.num_prefill_tokens, step.num_seqs) == (tokens, prefill, seqs)
        assert step.num_seqs <= step.num_running and 0 < step.kv_cache_usage <= 1


def test_preemptions_are_those_of_the_counter_and_of_the_requests(preempting: tuple[Traced, Trace]):
    engine, trace = preempting
    count = sum(step.num_preemptions for step in trace.steps)
    assert count == engine.core.scheduler.stats().num_preemptions > 0
    assert sum(len(request.preempted) for request in trace.requests) == count
    assert max(step.num_waiting for step in trace.steps) > 0


def test_times_are_in_order(preempting: tuple[Traced, Trace]):
    _, trace = preempting
    assert all(min(s.schedule_time, s.launch_time, s.wait_time, s.update_time) >= 0 for s in trace.steps)
    for step, following in zip(trace.steps, trace.steps[1:], strict=False):
        assert step.start < following.start
        assert step.device_start + step.device_time <= following.device_start + 1e-9
    for step in trace.steps:
        done = step.read_start + step.wait_time
        assert step.device_start >= step.start + step.schedule_time
        assert step.device_start + step.device_time == pytest.approx(done, abs=1e-9)
    for request in trace.requests:
        assert request.scheduled is not None and request.first_token is not None and request.last_token is not None
        assert 0 <= request.queued <= request.scheduled <= request.first_token <= request.last_token
        times = [time for span in request.preempted for time in span]
        assert times == sorted(times) and all(request.scheduled <= time <= request.last_token for time in times)


class ByHand:
    """The engine's calls at given moments."""

    def __init__(self) -> None:
        self.now = 10.0
        engine = FakeEngine()
        self.core = engine.core
        self.trace = Trace(lambda _: None, lambda _: None)
        self.recorder = TraceRecorder(
            self.trace,
            engine.core.scheduler,
            bucket=lambda tokens, seqs: (8 * tokens, 2 * seqs),
            clock=lambda: self.now,
        )
        self.request = engine.add("a", [1, 2, 3], 4)

    def step(self, number: int, start: int, count: int) -> SchedulerOutput:
        return SchedulerOutput(
            step=number, admitted=[], rows=[0], starts=[start], counts=[count], wanted=[1], new_blocks=[],
            requests=[self.request],
        )  # fmt: skip

    def launch(self, step: SchedulerOutput, begin: float, decided: float, launched: float) -> None:
        for call, now in (("turn_begins", begin), ("scheduled", decided), ("launched", launched)):
            self.now = 10.0 + now
            getattr(self.recorder, call)(*([] if call == "turn_begins" else [step]))

    def read(self, step: SchedulerOutput, begin: float, read: float, updated: float) -> None:
        for call, now in (("read_begins", begin), ("read", read), ("updated", updated)):
            self.now = 10.0 + now
            getattr(self.recorder, call)(*([step, StepUpdates()] if call == "updated" else [step]))

    def process(self, step: SchedulerOutput, processed: float) -> None:
        self.now = 10.0 + processed
        self.recorder.processed(step, StepUpdates())


def test_the_times_of_two_steps_of_which_the_second_waits_for_the_device():
    hand = ByHand()
    first, second = hand.step(0, 0, 3), hand.step(1, 3, 1)
    third = hand.step(2, 4, 1)
    hand.launch(first, 1.0, 1.25, 2.0)
    hand.launch(second, 2.0, 2.5, 2.875)
    hand.read(first, 3.0, 5.0, 5.5)
    hand.process(first, 5.75)
    hand.launch(third, 5.75, 5.875, 6.0)
    hand.read(second, 6.0, 6.5, 6.75)
    hand.process(second, 7.0)
    # nothing was launched in between
    hand.read(third, 7.0, 7.5, 7.625)
    hand.process(third, 8.0)
    one, two, three = hand.trace.steps
    assert (three.schedule_time, three.host_time) == (0.125, 0.125 + 0.125 + 0.125 + 0.375)
    assert (one.start, one.schedule_time, one.launch_time) == (1.0, 0.25, 0.75)
    assert (one.read_start, one.wait_time, one.update_time) == (3.0, 2.0, 0.5)
    assert (one.output_start, one.output_time) == (5.5, 0.25)
    assert (two.output_start, two.output_time) == (6.75, 0.25)
    assert (one.device_start, one.device_time, one.host_time) == (1.25, 3.75, 1.75)
    assert (one.num_prefill_tokens, one.num_decode_tokens) == (3, 0)
    assert (one.bucket_tokens, one.bucket_seqs) == (24, 2)
    # launched at 2.5, but the device had the first until 5.0
    assert (two.device_start, two.device_time) == (5.0, 1.5)
    assert (two.num_prefill_tokens, two.num_decode_tokens) == (0, 1)


def test_a_trace_that_starts_and_stops_between_launch_and_result():
    engine = Traced()
    for name in ("a", "b"):
        engine.add(name, [1, 2, 3], 12)
    while len(engine.steps) < 3:
        engine.core.step()
    before = max(engine.steps)
    trace = engine.trace().start()
    while len(engine.steps) < 8:
        engine.core.step()
    assert trace.stop() is trace
    engine.run()
    # the step in flight at either end is not the trace's
    assert [step.step for step in trace.steps] == [before + 1, before + 2, before + 3, before + 4]
    assert [(request.request_id, request.finish_reason) for request in trace.requests] == [("a", None), ("b", None)]
    assert all(request.queued < 0 for request in trace.requests)
    recorded = list(trace.steps)
    engine.add("c", [1], 3)
    engine.run()
    assert trace.steps == recorded


def test_a_failed_step_ends_the_requests_of_the_trace():
    engine = Traced()
    with engine.trace() as trace:
        engine.add("a", [1, 2, 3], 12)
        engine.core.step()
        engine.core.step()
        # one is in flight
        execute, engine.device.execute = engine.device.execute, lambda step: 1 / 0  # pyright: ignore
        with pytest.raises(ZeroDivisionError):
            engine.core.step()
        engine.device.execute = execute
        engine.device.rows.clear()
        engine.add("b", [4, 5], 3)
        engine.run()
    assert [(r.request_id, r.finish_reason) for r in trace.requests] == [("a", "error"), ("b", "length")]
    assert trace.steps[-1].num_running == 1


def test_arrays_table_and_dictionary_agree(preempting: tuple[Traced, Trace]):
    pytest.importorskip("pandas")
    _, trace = preempting
    arrays = trace.arrays()
    assert arrays["num_decode_tokens"].dtype == np.int64 and arrays["wait_time"].dtype == np.float64
    table = trace.to_pandas()
    assert list(table.index) == [step.step for step in trace.steps]
    as_dict = json.loads(json.dumps(trace.to_dict()))
    for i, step in enumerate(trace.steps):
        assert as_dict["steps"][i]["kv_cache_usage"] == step.kv_cache_usage == table["kv_cache_usage"].iloc[i]
        assert arrays["num_seqs"][i] == step.num_seqs == table["num_seqs"].iloc[i]
    assert StepRecord(**as_dict["steps"][0]) == trace.steps[0]
    tuples = lambda r: {"preempted": tuple(map(tuple, r["preempted"])), "block_hashes": tuple(r["block_hashes"])}  # noqa: E731
    requests = [{**r, **tuples(r)} for r in as_dict["requests"]]
    assert [RequestRecord(**request) for request in requests] == trace.requests
    assert repr(trace).startswith(f"Trace({len(trace.steps)} steps and 5 requests in ")


def test_a_table_needs_pandas(preempting: tuple[Traced, Trace], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        preempting[1].to_pandas()


# The Trace Event Format.


def check_format(listed: list[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[int, int, str]]]:
    """The documented rules of the phases used here; returns each track's slices."""
    tracks: dict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    times = []
    for event in listed:
        assert isinstance(event["name"], str) and event["name"]
        assert all(isinstance(event[key], int) for key in ("pid", "tid"))
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["ts"], int) and event["ts"] >= 0
        times.append(event["ts"])
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        else:
            assert event["ph"] == "i" and event["s"] in ("g", "p", "t")
    assert times == sorted(times)
    for slices in tracks.values():
        open_until: list[int] = []
        for start, end, name in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], f"{name} crosses the end of the slice that it begins in"
            open_until.append(end)
    return tracks


def test_the_chrome_trace_keeps_the_formats_rules(preempting: tuple[Traced, Trace], tmp_path: Path):
    _, trace = preempting
    trace.save_chrome_trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["displayTimeUnit"] == "ms"
    tracks = check_format(written["traceEvents"])
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in written["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert set(names) == set(tracks)
    assert sorted(names.values()) == ["device", "host", *(f"request {name}" for name in PROMPTS)]
    by_name = {name: [what for _, _, what in tracks[track]] for track, name in names.items()}
    assert by_name["device"] == [f"step {step.step}" for step in trace.steps]
    for phase in ("schedule", "launch", "wait", "update", "output"):
        assert by_name["host"].count(phase) == len(trace.steps)
    for request in trace.requests:
        found = by_name[f"request {request.request_id}"]
        assert [name for name in found if name != "preempted"] == ["queued", "prefill", "decode"]
    marks = [event for event in written["traceEvents"] if event["ph"] == "i"]
    assert len(marks) == sum(step.num_preemptions > 0 for step in trace.steps)


def test_requests_from_before_the_trace_have_no_negative_times():
    engine = Traced()
    engine.add("a", [1, 2, 3], 12)
    engine.core.step()
    with engine.trace() as trace:
        engine.run()
    assert trace.requests[0].queued < 0
    check_format(events(trace))


def test_an_empty_trace():
    trace = Trace(lambda _: None, lambda _: None)
    assert repr(trace) == "Trace(no steps)"
    assert {len(array) for array in trace.arrays().values()} == {0}
    assert trace.to_dict() == {"steps": [], "requests": [], "stages": []}
    check_format(events(trace))
    assert len(trace.plot().axes) == 4


# The picture.


def test_the_picture_shows_the_numbers(preempting: tuple[Traced, Trace], tmp_path: Path):
    _, trace = preempting
    figure = trace.plot()
    tokens, requests, cache, _ = figure.axes
    arrays = trace.arrays()

    def values(panel: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
        (patch,) = [patch for patch in panel.patches if patch.get_label() == label]
        data = patch.get_data()
        return data.values, data.baseline

    decode, prefill = arrays["num_decode_tokens"], arrays["num_prefill_tokens"]
    np.testing.assert_array_equal(values(tokens, "decode")[0], decode)
    np.testing.assert_array_equal(values(tokens, "prefill")[0] - values(tokens, "prefill")[1], prefill)
    np.testing.assert_array_equal(values(requests, "running")[0], arrays["num_running"])
    np.testing.assert_array_equal(values(cache, "in use")[0], 100 * arrays["kv_cache_usage"])
    (marks,) = [line for line in cache.lines if line.get_label() == "preemption"]
    np.testing.assert_array_equal(marks.get_xdata(), arrays["device_start"][arrays["num_preemptions"] > 0])
    # as wide as the device was busy with it
    drawn: Any = next(patch for patch in tokens.patches if patch.get_label() == "decode")
    edges = drawn.get_data().edges
    np.testing.assert_array_equal(edges[:-1], arrays["device_start"])
    figure.savefig(tmp_path / "trace.png")
    assert figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]


def test_the_picture_shows_stages_and_bubbles(preempting: tuple[Traced, Trace], tmp_path: Path):
    """Two stages of two replicas: a bar is a step at a stage, and what the bars leave free is the bubble."""
    trace = Trace(lambda _: None, lambda _: None)
    times = [[(0, 0.0, 1.0), (1, 0.0, 2.0)], [(0, 0.0, 2.0), (1, 0.0, 4.0)]]
    for engine in (0, 1):
        trace.steps += [dataclasses.replace(step, engine=engine) for step in preempting[1].steps[:2]]
        trace.stages += stage_records(times, 0.0, engine)
    figure = trace.plot()
    assert len(figure.axes) == 10
    for panel in figure.axes[8:]:
        assert [label.get_text() for label in panel.get_yticklabels()] == ["stage 1", "stage 2"]
        bars = [path.get_extents().bounds for drawn in panel.collections for path in drawn.get_paths()]
        spans = sorted((round(y + height / 2), x, width) for x, y, width, height in bars)
        # of each stage the whole time and two steps
        assert spans == [(0, 0, 1), (0, 0, 4), (0, 1, 1), (1, 0, 4), (1, 1, 1), (1, 2, 2)]
        legend = panel.get_legend()
        # the first works for 2 of 4 seconds, the second one for 3
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["bubble, 38%", "at work"]
    assert [panel.get_xlabel() for panel in figure.axes] == [""] * 8 + ["seconds"] * 2
    figure.savefig(tmp_path / "trace.png")
