"""Weights in forms that few checkpoints have, beside what engines may be asked for: answers are those of the same
numbers in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.own_process import found_by
from support.quantized_pairs import ENGINES, KINDS

pytest.importorskip("peft")


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["modelopt nvfp4", "quark uint4 in groups", "auto-round mxfp4"])
def test_answers_are_those_of_the_same_numbers(form: str, tmp_path: Path):
    """Drafted by n-grams or by a model in another form, on two devices, with weights and blocks on the host, saved and
    loaded, with an adapter, after sleep.
    """
    found: dict[str, Any] = found_by("support.quantized_pairs", tmp_path, form)
    wanted = found["float32"]
    assert wanted["adapted"] != wanted["plain"] != wanted["seeded"]
    for name in ENGINES:
        for kind in (*KINDS, "after sleep", *(["adapted"] if "adapted" in found[name] else [])):
            same = wanted["plain" if kind == "after sleep" else kind]
            for (tokens, score), (others, theirs) in zip(found[name][kind], same, strict=True):
                assert tokens == others, (name, kind)
                assert score == pytest.approx(theirs, abs=2e-3), (name, kind)
    assert found["offloading"]["right drafts"] and found["split"]["right drafts"]
