"""A GGUF file's embedding and head stay in their blocks: on one device, on two, in two stages, updated, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.own_process import found_by


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.gguf_tables", tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("engine", ["blocks", "two devices", "two stages", "updated", "saved"])
def test_answers_are_those_of_the_widened_file(found: dict[str, Any], engine: str):
    np.testing.assert_allclose(found[engine]["logprobs"], found["widened"]["logprobs"], atol=2e-3)
    assert found[engine]["tokens"] == found["widened"]["tokens"]


def test_weights_take_what_they_take_in_the_file(found: dict[str, Any]):
    assert found["blocks"]["quantized"] and found["two devices"]["quantized"] and not found["widened"]["quantized"]
    assert found["blocks"]["bytes"] == pytest.approx(found["file bytes"], rel=0.03)
    assert found["widened"]["bytes"] > 3 * found["file bytes"]


@pytest.mark.thorough
def test_layers_of_several_forms_beside_other_settings(tmp_path: Path):
    """They are scanned together: what one engine answers in blocks, all do."""
    engines = found_by("support.gguf_tables", tmp_path, "forms")
    plain = engines["plain"]["tokens"]
    for name, engine in engines.items():
        assert engine["segments"] == [1, 1] and engine["tokens"] == plain, name
    assert plain[0] == plain[1] and len({tuple(tokens) for tokens in plain[0]}) == 3
    for name in ("preemption, KV offloading", "own drafts, several decode steps"):
        assert engines[name]["counters"]["vllm:num_preemptions"] > 0, name
    assert engines["preemption, KV offloading"]["counters"]["vllm:external_prefix_cache_hits"] > 0
    # of weights that are noise hardly any is right
    assert engines["own drafts, several decode steps"]["counters"]["vllm:spec_decode_num_draft_tokens"] > 0
