"""Beam search against transformers'."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import SMALL
from transformers import AutoModelForCausalLM

from jaxllm import LLM, BeamSearchParams
from jaxllm.api.errors import ValidationError

PROMPTS = ["the first one", "a second prompt, longer than the first one"]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 4])
def test_the_beams_are_transformers_beams(tiny_model: Path, engine: LLM, width: int, length_penalty: float):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    params = BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=True, length_penalty=length_penalty)
    outputs = engine.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([engine.get_tokenizer().encode(prompt)])
        expected = model.generate(
            ids, num_beams=width, num_return_sequences=width, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            length_penalty=length_penalty, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        assert [sequence.tokens for sequence in output.sequences] == expected.sequences.tolist()
        if width > 1:
            scores = [sequence.score(length_penalty) for sequence in output.sequences]
            assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
        for sequence in output.sequences:
            assert sequence.finish_reason == "length" and len(sequence.logprobs) == 8
            assert sequence.text == engine.get_tokenizer().decode(sequence.tokens)


def test_what_is_searched_together_is_what_is_found_alone(engine: LLM):
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    together = engine.beam_search(PROMPTS * 2, params)
    one_by_one = engine.beam_search(PROMPTS * 2, params, concurrency_limit=1)
    found = [[s.tokens for s in output.sequences] for output in together]
    assert found == [[s.tokens for s in output.sequences] for output in one_by_one]
    assert found[:2] == found[2:]


def test_an_end_of_sequence_completes_a_beam(tiny_model: Path):
    # the token that the best beam generates third is made the end
    with LLM(tiny_model, **SMALL) as llm:
        best = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True))[0]
    prompt_length = len(best.sequences[0].tokens) - 6
    eos = best.sequences[0].tokens[prompt_length + 2]
    with LLM(tiny_model, hf_overrides={"eos_token_id": eos}, **SMALL) as llm:
        for included in (False, True):
            params = BeamSearchParams(beam_width=2, max_tokens=6, include_stop_str_in_output=included)
            (output,) = llm.beam_search(PROMPTS[0], params)
            assert len(output.sequences) == 2
            stopped = [s for s in output.sequences if s.finish_reason == "stop"]
            assert stopped and all(s.stop_reason == eos for s in stopped)
            for sequence in stopped:
                assert (sequence.tokens[-1] == eos) == included
                assert len(sequence.logprobs) == len(sequence.tokens) - prompt_length + (not included)


def test_a_full_context_ends_the_search(engine: LLM):
    (output,) = engine.beam_search([list(range(250))], BeamSearchParams(beam_width=2, max_tokens=20))
    assert all(len(sequence.tokens) == 256 for sequence in output.sequences)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beam_width": 0, "max_tokens": 1}, "beam_width must be at least 1, got 0"),
        ({"beam_width": 1, "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"beam_width": 1, "max_tokens": 1, "temperature": 3.0}, r"temperature must be in \[0, 2\], got 3.0"),
        ({"beam_width": 1.5, "max_tokens": 1}, "beam_width must be an integer, got 1.5"),
        ({"beam_width": 1, "max_tokens": 1, "length_penalty": "long"}, "length_penalty must be a number"),
    ],
)
def test_bad_parameters_are_refused(values: dict, words: str):
    with pytest.raises(ValidationError, match=words):
        BeamSearchParams(**values)


def test_bad_calls_are_refused(engine: LLM):
    with pytest.raises(ValidationError, match="logprobs of 22, which is greater than max allowed: 20"):
        engine.beam_search("x", BeamSearchParams(beam_width=11, max_tokens=2))
    with pytest.raises(ValidationError, match="empty"):
        engine.beam_search(["x", ""], BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(ValidationError, match="concurrency_limit must be at least 1, got 0"):
        engine.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=2), concurrency_limit=0)
    with pytest.raises(TypeError, match="must be BeamSearchParams, got dict"):
        engine.beam_search("x", {"beam_width": 2})  # pyright: ignore[reportArgumentType]


def test_an_aborted_prompt_returns_its_partial_beams_and_the_others_go_on(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    whole = engine.beam_search(PROMPTS, params)
    client, step = engine.engine.client, engine.engine.client.step
    # a search takes an id for the one beam of each prompt, then for two of each
    first_of_second_prompt = int(client.next_id()) + 1 + 2 + 2

    def abort_it() -> None:
        engine.llm_engine.abort_request(str(first_of_second_prompt))
        step()

    with monkeypatch.context() as patch:
        patch.setattr(client, "step", abort_it)
        first, second = engine.beam_search(PROMPTS, params)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in whole[0].sequences]
    assert [s.finish_reason for s in first.sequences] == ["length"] * 2
    prompt = engine.get_tokenizer().encode(PROMPTS[1])
    assert [s.finish_reason for s in second.sequences] == ["abort"] * 2
    for sequence in second.sequences:
        assert sequence.tokens[: len(prompt)] == prompt
        assert len(sequence.tokens) == len(prompt) + 1
        assert sequence.text == engine.get_tokenizer().decode(sequence.tokens)


def test_a_search_whose_requests_are_all_aborted_returns_what_there_is(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    """Another call aborts all requests while this one waits for its turn."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.client, "step", engine.engine.client.abort_all)
        outputs = engine.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=4))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (sequence,) = output.sequences
        assert sequence.finish_reason == "abort" and sequence.text == prompt


def test_another_thread_aborts_a_search_by_its_name(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    whole = engine.beam_search(PROMPTS, params)
    feeds, steps = engine.engine.feeds, 0
    feed = feeds.feed

    def abort_before_the_third_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            thread = threading.Thread(target=engine.abort, args=("second",))
            thread.start()
            thread.join()
        return feed(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(feeds, "feed", abort_before_the_third_step)
        first, second = engine.beam_search(PROMPTS, params, request_ids=["first", "second"])
    assert [s.tokens for s in first.sequences] == [s.tokens for s in whole[0].sequences]
    prompt = engine.get_tokenizer().encode(PROMPTS[1])
    assert [s.finish_reason for s in second.sequences] == ["abort"] * 2
    assert [len(s.tokens) - len(prompt) for s in second.sequences] == [2, 2]
    # the names are free again, and what is unknown is passed over
    engine.abort(["second", "nobody"])
    again = engine.beam_search(PROMPTS, params, request_ids=["first", "second"])
    assert [s.tokens for s in again[1].sequences] == [s.tokens for s in whole[1].sequences]
    for names in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ValidationError, match="request_ids must be 2 different names"):
            engine.beam_search(PROMPTS, params, request_ids=names)


def test_what_is_enqueued_is_aborted_by_its_id(engine: LLM):
    first, _ = engine.enqueue(PROMPTS)
    engine.abort(first)
    outputs = engine.wait_for_completion(use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "length"]
