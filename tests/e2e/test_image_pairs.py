"""Prompts with pictures get the same whatever else an engine does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from support.image_pairs import ENGINES, KINDS, PROMPTS, engines
from support.own_process import found_by

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.thorough


FAMILIES = ("qwen2_5_vl", "gemma3")
PAIRS = [
    (family, engine)
    for family in FAMILIES
    for engine in (*engines(family), "after a sleep", "saved and read")
    if engine != "plain"
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a family's engines answered: asked once, in whatever order tests want it."""
    return functools.cache(lambda family: found_by("support.image_pairs", tmp_path_factory.mktemp(family)))


@pytest.fixture(params=FAMILIES)
def found(request: pytest.FixtureRequest, answers: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return answers(request.param)


@pytest.mark.parametrize(("found", "engine"), PAIRS, indirect=["found"])
def test_answers_are_those_of_the_plain_engine(found: dict[str, Any], engine: str):
    assert found[engine] == found["plain"]


def of_drafts(found: dict[str, Any], engine: str) -> float:
    """The share that was right."""
    counted = found[f"{engine}: counted"]
    return counted["right drafts"] / counted["drafts"]


def test_the_settings_were_met(found: dict[str, Any]):
    assert found["split, prefixes, preemption: counted"]["preemptions"] > 0
    assert found["host blocks, offloaded weights: counted"]["hits on the host"] > 0
    drafting = [engine for engine in ENGINES if "drafts" in engine and engine in found]
    assert len(drafting) >= 2 and all(found[f"{engine}: counted"]["right drafts"] > 0 for engine in drafting)


@pytest.mark.parametrize("found", FAMILIES[:1], indirect=True)
def test_stages_and_drafts_meet_pictures(found: dict[str, Any]):
    assert found["stages: counted"]["preemptions"] > 0
    of_engine, planned = found["planned"]
    assert of_engine == planned and of_engine > 0
    # the same weights: those that read the pictures, too, know more than those that read the tokens in their places
    assert of_drafts(found, "drafts of itself") > 1.3 * of_drafts(found, "drafts of another model")


def test_without_the_tower_texts_are_the_same_and_pictures_refused(found: dict[str, Any]):
    place = list(PROMPTS).index("a text") * len(KINDS) + list(KINDS).index("greedy")
    assert found["plain"][place] == [found["text without the tower"]]
    assert "limit_mm_per_prompt has switched them off" in found["a picture without the tower"]
