"""Drafters beside what requests and engines may be asked for."""

from __future__ import annotations

from typing import Any

import pytest
from support.own_process import found_by
from support.pairs import KINDS, assert_same_answer

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.drafter_pairs", tmp_path_factory.mktemp("drafter_pairs"))


@pytest.mark.parametrize("way", ["generated", "streamed", "after sleep"])
@pytest.mark.parametrize("drafter", ["model", "suffix"])
def test_a_drafter_over_two_devices_changes_nothing(found: dict[str, Any], drafter: str, way: str):
    """Whatever a request asks for, with preemptions, chunks and prefixes."""
    got, wanted = found[drafter][way], found["plain"]["generated"]
    assert set(got) == set(KINDS)
    for name, answer in got.items():
        assert_same_answer(answer, wanted[name], name)
    assert found[drafter]["preemptions"] and found[drafter]["right drafts"]
