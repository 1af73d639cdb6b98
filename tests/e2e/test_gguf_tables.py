"""A GGUF file's embedding and head stay in their blocks: on one device, on two, in two stages, updated, and saved."""

from __future__ import annotations

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
