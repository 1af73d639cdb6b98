"""Adapters' names: vLLM's fields, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest


def test_fields_come_in_vllms_order():
    request = LoRARequest("sql", 1, "/adapters/sql", "meta-llama/Llama-3.2-3B", None, True)
    assert (request.base_model_name, request.load_inplace) == ("meta-llama/Llama-3.2-3B", True)
    assert (request.name, request.adapter_id, request.path) == ("sql", 1, "/adapters/sql")


def test_a_path_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["sql", "sql/", tmp_path / "sql", "~/sql"]
    assert {LoRARequest("sql", 1, path).path for path in paths} == {str(tmp_path / "sql")}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"lora_name": ""}, "lora_name must be a text"),
        ({"lora_int_id": 0}, "lora_int_id must be at least 1, got 0"),
        ({"lora_path": ""}, "lora_path must be the folder of an adapter"),
        ({"load_inplace": "no"}, "load_inplace must be True or False, got 'no'"),
        ({"base_model_name": 1}, "base_model_name must be a text or None"),
        ({"tensorizer_config_dict": {"uri": "x"}}, "tensorizer_config_dict is not supported"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight is not supported"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: str):
    with pytest.raises(ValidationError, match=error):
        LoRARequest(**{"lora_name": "sql", "lora_int_id": 1, "lora_path": "/adapters/sql", **given})
