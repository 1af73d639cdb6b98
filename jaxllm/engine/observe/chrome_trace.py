"""A trace in the Trace Event Format of Chrome, which Perfetto reads too.

The format: "Trace Event Format" (Google, 2016). Times are in microseconds. Slices of one track nest or follow each
other; ours follow each other, but for preemptions, which lie inside their request's slices.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.engine.observe.trace import RequestRecord, StepRecord, Trace

#: ids of processes: the requests', and from this one on the replicas' beside the first, which is 1
_REQUESTS = 2
#: threads: those of a pipeline's stages are the last
_HOST, _DEVICE, _STAGES = 1, 2, 3


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events(trace), "displayTimeUnit": "ms"}, file)


def events(trace: Trace) -> list[dict[str, Any]]:
    """Metadata, then slices, counters and marks, in the order of time."""
    # the format knows no times before 0, but a request may have come before the trace was on
    zero = min([0.0, *(request.queued for request in trace.requests)])
    listed = _names(trace)
    timed: list[dict[str, Any]] = []
    for step in trace.steps:
        timed += _step(step, zero)
    for record in trace.stages:
        what = {"step": record.step}
        place = _pid(record.engine), _STAGES + record.stage
        timed.append(_slice(f"step {record.step}", record.start, record.end, *place, zero, what))
    for number, request in enumerate(trace.requests, start=1):
        timed += _request(request, number, zero)
    return listed + sorted(timed, key=lambda event: event["ts"])


def _names(trace: Trace) -> list[dict[str, Any]]:
    def name(kind: str, text: str, pid: int, tid: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}

    engines = trace.engines or [0]
    return [
        *(
            each
            for engine in engines
            for each in (
                name("process_name", f"engine {engine}" if len(engines) > 1 else "engine", _pid(engine)),
                name("thread_name", "host", _pid(engine), _HOST),
                name("thread_name", "device", _pid(engine), _DEVICE),
            )
        ),
        *(
            name("thread_name", f"stage {stage + 1}", _pid(engine), _STAGES + stage)
            for engine, stage in sorted({(record.engine, record.stage) for record in trace.stages})
        ),
        name("process_name", "requests", _REQUESTS),
        *(
            name("thread_name", f"request {request.request_id}", _REQUESTS, number)
            for number, request in enumerate(trace.requests, start=1)
        ),
    ]


def _pid(engine: int) -> int:
    return engine + (_REQUESTS if engine else 1)


def _step(step: StepRecord, zero: float) -> list[dict[str, Any]]:
    pid = _pid(step.engine)
    what = {
        "step": step.step,
        "prefill tokens": step.num_prefill_tokens,
        "decode tokens": step.num_decode_tokens,
        "sequences": step.num_seqs,
        "bucket": f"{step.bucket_tokens} tokens x {step.bucket_seqs} seqs",
    }
    decided, waited = step.start + step.schedule_time, step.read_start + step.wait_time
    title = f"step {step.step}"
    slices = [
        _slice("schedule", step.start, decided, pid, _HOST, zero, {"step": step.step}),
        _slice("launch", decided, decided + step.launch_time, pid, _HOST, zero, {"step": step.step}),
        _slice("wait", step.read_start, waited, pid, _HOST, zero, {"step": step.step}),
        _slice("update", waited, waited + step.update_time, pid, _HOST, zero, {"step": step.step}),
        _slice(
            "output", step.output_start, step.output_start + step.output_time, pid, _HOST, zero, {"step": step.step}
        ),
        _slice(title, step.device_start, step.device_start + step.device_time, pid, _DEVICE, zero, what),
    ]
    counters = {
        "tokens": {"prefill": step.num_prefill_tokens, "decode": step.num_decode_tokens},
        "requests": {"running": step.num_running, "waiting": step.num_waiting},
        "KV cache %": {"used": round(100 * step.kv_cache_usage, 3)},
    }
    at = _microseconds(decided, zero)
    counted = [
        {"ph": "C", "name": name, "pid": pid, "tid": _HOST, "ts": at, "args": values}
        for name, values in counters.items()
    ]
    if step.num_preemptions:
        text = "preemption" if step.num_preemptions == 1 else f"{step.num_preemptions} preemptions"
        counted.append({"ph": "i", "s": "p", "name": text, "pid": pid, "tid": _HOST, "ts": at})
    return slices + counted


def _request(request: RequestRecord, number: int, zero: float) -> list[dict[str, Any]]:
    what = {
        "prompt tokens": request.num_prompt_tokens,
        "cached tokens": request.num_cached_tokens,
        "output tokens": request.num_output_tokens,
        "finish reason": request.finish_reason,
    }
    slices = [_slice(name, start, end, _REQUESTS, number, zero, what) for name, start, end in request.spans()]
    slices += [_slice("preempted", start, end, _REQUESTS, number, zero, {}) for start, end in _nested(request)]
    return slices


def _nested(request: RequestRecord) -> list[tuple[float, float]]:
    """The preemptions, cut where one slice of the request ends and the next begins."""
    return [
        (max(start, first), min(end, last))
        for first, last in request.preempted
        for _, start, end in request.spans()
        if max(start, first) < min(end, last)
    ]


def _slice(
    name: str, start: float, end: float, pid: int, tid: int, zero: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    begin = _microseconds(start, zero)
    length = max(_microseconds(end, zero) - begin, 0)
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": begin, "dur": length, "args": arguments}


def _microseconds(seconds: float, zero: float) -> int:
    # whole ones, and from whole nanoseconds: else the rounding errors of floats would let neighbours overlap
    return round((seconds - zero) * 1e9) // 1000
