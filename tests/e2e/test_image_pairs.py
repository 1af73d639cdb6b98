"""Prompts with pictures get the same whatever else an engine does."""

from __future__ import annotations

from typing import Any

import pytest
from support.image_pairs import ENGINES, KINDS, PROMPTS
from support.own_process import found_by

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.image_pairs", tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("engine", [*(name for name in ENGINES if name != "plain"), "after a sleep", "saved and read"])
def test_answers_are_those_of_the_plain_engine(found: dict[str, Any], engine: str):
    assert found[engine] == found["plain"]


def of_drafts(found: dict[str, Any], engine: str) -> float:
    """The share that was right."""
    counted = found[f"{engine}: counted"]
    return counted["right drafts"] / counted["drafts"]


def test_the_settings_were_met(found: dict[str, Any]):
    assert found["split, prefixes, preemption: counted"]["preemptions"] > 0
    assert found["host blocks, offloaded weights: counted"]["hits on the host"] > 0
    assert found["stages: counted"]["preemptions"] > 0
    drafting = [engine for engine in ENGINES if "drafts" in engine]
    assert len(drafting) == 5 and all(found[f"{engine}: counted"]["right drafts"] > 0 for engine in drafting)
    # what reads the pictures, too, knows more than what reads the tokens in their place
    assert of_drafts(found, "drafts of itself") > 0.8 > of_drafts(found, "drafts of another model")


def test_without_the_tower_texts_are_the_same_and_pictures_refused(found: dict[str, Any]):
    place = list(PROMPTS).index("a text") * len(KINDS) + list(KINDS).index("greedy")
    assert found["plain"][place] == [found["text without the tower"]]
    assert "limit_mm_per_prompt has switched them off" in found["a picture without the tower"]
