"""`thinking_token_budget`, and grammars behind the reasoning, on a model that "reasons" between parentheses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError

MARKS = {"reasoning_start_str": "(", "reasoning_end_str": ")."}


@pytest.fixture(scope="module", params=[True, False], ids=["asynchronous", "synchronous"])
def thinker(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(tiny_model, **SMALL, reasoning_config=MARKS, async_scheduling=request.param) as llm:
        yield llm


def letters(llm: LLM, extra: str = "") -> dict[str, Any]:
    """Parameters under which the model writes letters, and marks where it is forced to."""
    return {"allowed_token_ids": llm.get_tokenizer().encode("abcdefg)." + extra), "max_tokens": 20, "seed": 1}


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_reasoning_ends_when_the_budget_is_spent(thinker: LLM, budget: int):
    params = SamplingParams(thinking_token_budget=budget, logit_bias=discourage(thinker, ")."), **letters(thinker))
    texts = [o.outputs[0].text for o in thinker.generate(["q (", "q (ab", "q (ab). "], params, use_tqdm=False)]
    assert texts[0].index(").") == budget
    # what the prompt has of the reasoning counts
    assert texts[1].index(").") == max(budget - 2, 0)
    assert ")" not in texts[2]
    assert all(len(text) == 20 for text in texts)


@pytest.mark.parametrize("budget", [None, -1])
def test_no_limit(thinker: LLM, budget: int | None):
    params = SamplingParams(thinking_token_budget=budget, logit_bias=discourage(thinker, ")."), **letters(thinker))
    assert ")" not in thinker.generate("q (", params, use_tqdm=False)[0].outputs[0].text


def test_reasoning_that_is_generated_has_a_budget_as_well(thinker: LLM):
    params = SamplingParams(thinking_token_budget=2, logit_bias=discourage(thinker, ")."), **letters(thinker, "("))
    text = thinker.generate("q", params, use_tqdm=False)[0].outputs[0].text
    opened = text.split("(")[1:]
    assert opened and all(part.find(").") in (0, 1, 2) for part in opened if len(part) > 3)


@pytest.mark.parametrize("budget", [3, None])
def test_a_grammar_begins_behind_the_reasoning(thinker: LLM, budget: int | None):
    params = SamplingParams(
        thinking_token_budget=budget,
        structured_outputs={"choice": ["yes", "no"]},
        # without a budget the model is made to end its reasoning itself, after which the bias counts no more
        logit_bias=discourage(thinker, ").") if budget else dict.fromkeys(thinker.get_tokenizer().encode(")."), 9.0),
        max_tokens=200,
    )
    outputs = thinker.generate(["q (", "q (a). "], params, use_tqdm=False)
    reasoning, _, answer = outputs[0].outputs[0].text.partition(").")
    assert answer in ("yes", "no") and outputs[0].outputs[0].finish_reason == "stop"
    assert budget is None or len(outputs[0].outputs[0].token_ids) == budget + 2 + len(answer) + 1
    assert outputs[1].outputs[0].text in ("yes", "no")
    assert reasoning or budget is None


def test_a_grammar_in_the_reasoning_as_well(tiny_model: Path):
    with LLM(
        tiny_model, **SMALL, reasoning_config=MARKS, structured_outputs_config={"enable_in_reasoning": True}
    ) as llm:
        params = SamplingParams(structured_outputs={"choice": ["yes", "no"]})
        assert llm.generate("q (", params, use_tqdm=False)[0].outputs[0].text in ("yes", "no")


def test_marks_that_nobody_named(engine: LLM):
    with pytest.raises(ValidationError, match="no tokens '<think>' and '</think>'.*reasoning_config="):
        engine.generate("q", SamplingParams(thinking_token_budget=3), use_tqdm=False)


def test_repetition_ends_a_request(engine: LLM):
    free = SamplingParams(allowed_token_ids=engine.get_tokenizer().encode("a"), max_tokens=30)
    params = free.clone()
    params.repetition_detection = {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 3}
    outputs = engine.generate(["q", "q"], [params, free], use_tqdm=False)
    completion = outputs[0].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        "aaaaaa",
        "repetition",
        "repetition_detected",
    )
    assert outputs[1].outputs[0].finish_reason == "length"


def discourage(llm: LLM, text: str) -> dict[int, float]:
    return dict.fromkeys(llm.get_tokenizer().encode(text), -100.0)
