"""KV caches in 8 bits beside replicas, blocks that lie on the host, grammars, determinism and pooling."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from support.offloading import assert_came_back
from support.one_byte_caches import PATTERN
from support.own_process import found_by


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.one_byte_caches", tmp_path_factory.mktemp("caches"))


def test_deterministic_engines_give_the_same_bits_alone_and_beside_others(found: dict[str, Any]):
    assert found["alone"] == found["beside"]
    assert len({tuple(answer["ids"]) for answer in found["alone"]}) > 3


def test_what_comes_back_from_the_host_is_in_8_bits_too(found: dict[str, Any]):
    assert_came_back(found["offloading"])
    assert found["blocks that came back"] > 0
    assert found["from the host"] == found["alone"]


@pytest.mark.parametrize("name", ["alone", "beside", "from the host", "replicas"])
def test_grammars_are_kept(found: dict[str, Any], name: str):
    """After hits on the host, too."""
    for answer in found[name][1::2]:
        assert re.fullmatch(PATTERN, answer["text"]), answer["text"]


def test_replicas_answer_as_one_engine(found: dict[str, Any]):
    # of two layers: keys and values of two heads, 16 bytes and a float32 scale
    assert found["bytes per token"] == 2 * 2 * 2 * (16 + 4)
    for answer, expected in zip(found["replicas"], found["alone"], strict=True):
        assert (answer["ids"], answer["text"]) == (expected["ids"], expected["text"])
        np.testing.assert_allclose(answer["logprobs"], expected["logprobs"], atol=1e-3)


def test_pooling_differs_by_rounding(found: dict[str, Any]):
    rounded, plain = (np.array(found[f"pooling, {dtype}"]) for dtype in ("int8", "auto"))
    off = np.abs(rounded - plain).max()
    assert 1e-5 < off < 0.05
