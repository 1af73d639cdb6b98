"""Traces are read from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import from_dict
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.trace import RequestRecord, StepRecord, Trace


def read_trace(path: Path) -> Trace:
    """The trace of a file that `Trace.save` wrote. Raises ValidationError for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        trace = Trace(lambda _: None, lambda _: None)
        trace.steps = [StepRecord(**step) for step in found["steps"]]
        trace.requests = [RequestRecord(**{**each, **_tuples(each)}) for each in found["requests"]]
        trace.settings = EngineSettings.from_dict(found["settings"])
        trace.metrics = [from_dict(metric) for metric in found["metrics"]]
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = " It is a trace for Perfetto: trace.save(PATH) writes the one that is wanted."
        is_chrome = isinstance(error, KeyError | TypeError) and _is_chrome_trace(path)
        raise ValidationError(
            f"{path} is not a trace that `trace.save(PATH)` wrote ({error!r:.100}).{hint if is_chrome else ''}"
        ) from None
    return trace


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON has as lists."""
    return {
        "preempted": tuple((start, end) for start, end in record["preempted"]),
        "block_hashes": tuple(record["block_hashes"]),
    }


def _is_chrome_trace(path: Path) -> bool:
    found = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(found, list) or "traceEvents" in found
