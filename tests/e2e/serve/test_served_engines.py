"""Whatever engine is served, over whatever devices: a request gets the tokens that it gets offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.own_process import found_by
from support.served_engines import ENGINES, PROMPTS


@pytest.mark.thorough
def test_served_engines_answer_as_they_do_offline(tmp_path: Path):
    found = found_by("support.served_engines", tmp_path)
    assert found.keys() == ENGINES.keys() and len(found["one"]["offline"]) == len(PROMPTS)
    for name, answers in found.items():
        assert answers["offline"] == found["one"]["offline"] and answers["chat"] == found["one"]["chat"], name
        assert answers["served"] == answers["streamed"] == answers["offline"], name
        assert answers["served chat"] == answers["chat"], name
