"""Engines whose every layer is a segment, as on GPUs, on the CPU: as those with one segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.models.segments import resegment, segment_sizes
from jaxllm.runner.compile.target import Target

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["one", "two and two", "a longer line that fills more than one block of the cache"]


def answers(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def each_by_itself(self: Target, runs: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * sum(runs)


@pytest.fixture(scope="module")
def separate(tiny_model: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "segments", each_by_itself)
        llm = LLM(tiny_model, **SMALL)
    with llm:
        yield llm


def test_separate_layers_answer_as_stacked_ones(engine: LLM, separate: LLM):
    assert [llm.apply_model(segment_sizes) for llm in (engine, separate)] == [[(2,)], [(1, 1)]]
    assert answers(separate) == answers(engine)


@pytest.mark.parametrize("is_separate", [False, True])
def test_weights_are_taken_in_any_segments(
    engine: LLM, separate: LLM, is_separate: bool, monkeypatch: pytest.MonkeyPatch
):
    llm = separate if is_separate else engine
    if is_separate:
        monkeypatch.setattr(Target, "segments", each_by_itself)
    (params,) = llm.apply_model(lambda params: params)
    before = answers(llm)
    others = (2,) if is_separate else (1, 1)
    other = resegment(jax.tree.map(lambda array: -array, params), others)
    llm.update_weights(other)
    assert answers(llm) != before
    assert llm.apply_model(segment_sizes) == [segment_sizes(params)]
    wrong = dataclasses.replace(other, layers=other.layers[:1] + other.layers[2:])
    wrong = dataclasses.replace(wrong, layers=jax.tree.map(lambda array: array[:1], wrong.layers))
    with pytest.raises(ValidationError, match=r"params\.layers\[.\]\.attention_norm (must be float|is missing)"):
        llm.update_weights(wrong)
    with pytest.raises(ValidationError, match=r"'embedding' is no tensor .* you mean 'model.embed_tokens.weight'\?"):
        llm.update_weights({"embedding": params.embedding})
    llm.update_weights(resegment(params, others))
    assert answers(llm) == before
    llm.update_weights(params)
    assert answers(llm) == before


def test_separate_layers_sleep(separate: LLM):
    before = answers(separate)
    for level in (1, 2):
        separate.sleep(level)
        separate.wake_up()
        assert answers(separate) == before
