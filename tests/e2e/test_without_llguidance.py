"""Without llguidance only structured outputs are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError


def test_only_grammars_need_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("jaxllm.structured.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    short = SamplingParams(max_tokens=3, temperature=0.0)
    constrained = SamplingParams(max_tokens=3, structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
    with LLM(tiny_model, **SMALL) as llm:
        assert len(llm.generate("abc", short)[0].outputs[0].token_ids) == 3
        with pytest.raises(ValidationError, match="llguidance.*pip install"):
            llm.generate("abc", constrained)
        assert len(llm.generate("abc", short)[0].outputs[0].token_ids) == 3
