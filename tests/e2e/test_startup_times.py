"""What an engine says of the time that its start took."""

from __future__ import annotations

import time
import types
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM
from jaxllm.runner import build
from jaxllm.runner.compile.programs import Programs


def test_compiling_for_the_plan_is_booked_as_compiling(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    # a clock on which each of the plan's compilations takes an hour
    hours = 0
    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * hours)
    measure = Programs.activation_bytes

    def an_hour(self: Programs, *arguments: Any) -> int:
        nonlocal hours
        hours += 1
        return measure(self, *arguments)

    monkeypatch.setattr(build, "time", clock)
    monkeypatch.setattr(Programs, "activation_bytes", an_hour)
    with LLM(tiny_model, **SMALL) as llm:
        assert hours and llm.startup_times["compile"] >= 3600 * hours
        assert llm.startup_times["plan"] < 3600
