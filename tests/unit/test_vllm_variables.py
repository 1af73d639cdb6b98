"""Environment variables that a script sets for vLLM are not passed over in silence."""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.config.engine_args import EngineArgs
from jaxllm.startup.vllm_variables import INSTEAD, tell_of_variables


def test_they_are_named_with_what_stands_in_their_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name in INSTEAD:
        monkeypatch.delenv(name, raising=False)
    tell_of_variables()
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "0")
    tell_of_variables()
    assert not caplog.text
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    tell_of_variables()
    (record,) = caplog.records
    assert "VLLM_BATCH_INVARIANT (deterministic=True), VLLM_CPU_KVCACHE_SPACE (kv_cache" in record.getMessage()


def test_the_arguments_that_are_named_exist():
    named = {text.partition("=")[0] for text in INSTEAD.values() if "=" in text}
    assert named <= {field.name for field in dataclasses.fields(EngineArgs)}
