"""Adapters beside every setting of an engine that they go with, and in several families, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.lora_pairs import FAMILIES, LONG_FAMILIES, LONG_SETTINGS, PICTURES, SETTINGS
from support.own_process import found_by
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM
from jaxllm.api.errors import ValidationError


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.lora_pairs", tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("name", [*SETTINGS, *FAMILIES, *PICTURES])
def test_adapters_go_with(found: dict[str, Any], name: str):
    """Log-probabilities are PEFT's, and not those of the model without adapters."""
    assert found[name]["difference"] < 1e-4 and found[name]["from the base"] > 0.1


@pytest.mark.thorough
def test_adapters_go_with_what_compiles_much(tmp_path: Path):
    found = found_by("support.lora_pairs", tmp_path, *LONG_SETTINGS, *LONG_FAMILIES)
    for name, own in found.items():
        assert own["difference"] < 1e-4 and own["from the base"] > 0.1, name
    for name in LONG_SETTINGS:
        drafts = found[name]["counters"].get("vllm:spec_decode_num_draft_tokens", 0)
        assert (drafts > 0) == name.endswith("that drafts"), name


def test_the_settings_were_at_work(found: dict[str, Any]):
    def count(name: str, counter: str) -> int:
        return found[name]["counters"][f"vllm:{counter}"]

    assert count("preemption", "num_preemptions") and count("tensor parallel", "prefix_cache_hits")
    assert count("KV offloading", "external_prefix_cache_hits")
    assert count("drafts", "spec_decode_num_draft_tokens")
    assert count("a model that drafts", "spec_decode_num_accepted_tokens")


#: what adapters do not go with -> what is said
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tables and drafts": (
        {
            **{"speculative_config": {"method": "ngram", "num_speculative_tokens": 1}, "enforce_eager": False},
            "lora_embeddings": True,
        },
        "lora_embeddings=True and a speculative_config: nobody has seen",
    ),
    "offloaded weights": ({"cpu_offload_gb": 1}, "enable_lora=True with cpu_offload_gb=1: layers on the host"),
    "no model": ({"load_format": "null"}, 'enable_lora=True with load_format="null": there is no model'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_are_refused_with(tmp_path: Path, name: str):
    arguments, said = REFUSED[name]
    with pytest.raises(ValidationError, match=said):
        LLM(write_tiny_model(tmp_path), **{**SMALL, **arguments}, enable_lora=True)
