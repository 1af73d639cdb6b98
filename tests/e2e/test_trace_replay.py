"""Outputs that are given are written, and told of as the model sees them: against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_model import EOS, SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError

PROMPT = list(range(40, 75))
TRACE = [3, 200, EOS, 31, 31, 7]


def logprobs_of(model_path: Path, prompt: list[int], outputs: list[int]) -> torch.Tensor:
    """float32 [outputs, vocabulary]."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([prompt + outputs])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def assert_replayed(llm: LLM, model_path: Path) -> None:
    params = [
        SamplingParams(temperature=1.0, logprobs=2, trace_decode_token_ids=TRACE),
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=99, logprobs=0, trace_decode_token_ids=TRACE[::-1]),
    ]
    traced, free, backwards = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    for output, trace in ((traced, TRACE), (backwards, TRACE[::-1])):
        (told,) = output.outputs
        assert (list(told.token_ids), told.finish_reason) == (trace, "length")
        expected = logprobs_of(model_path, PROMPT, trace)
        for token, found, all_of_them in zip(trace, told.logprobs or (), expected, strict=True):
            assert found[token].logprob == pytest.approx(all_of_them[token].item(), abs=1e-4)
            assert found[token].rank == 1 + int((all_of_them > all_of_them[token]).sum())
    greedy = logprobs_of(model_path, PROMPT, list(free.outputs[0].token_ids)).argmax(-1)
    assert list(free.outputs[0].token_ids) == greedy.tolist()


def test_what_is_given_is_written(engine: LLM, tiny_model: Path):
    assert_replayed(engine, tiny_model)


@pytest.mark.thorough
def test_beside_drafts_and_launches_of_several_steps(tiny_model: Path):
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    arguments: dict[str, Any] = {**SMALL, "enforce_eager": False, "num_decode_steps": 4, "max_num_seqs": 3}
    with LLM(tiny_model, **arguments, speculative_config=drafts, enable_trace_replay=True) as llm:
        assert_replayed(llm, tiny_model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n=2 cannot change it"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs=.* cannot change it"),
        ({"stop": ["a"]}, r"stop=\['a'\] cannot change it"),
        ({"max_tokens": len(TRACE) - 1}, "max_tokens=.* allows fewer. Leave max_tokens out"),
        ({"min_tokens": len(TRACE) + 1, "max_tokens": None}, "min_tokens=.* asks for more. Leave min_tokens out"),
        ({"trace_decode_token_ids": []}, "trace_decode_token_ids must not be empty"),
        ({"trace_decode_token_ids": ["a"]}, "trace_decode_token_ids"),
    ],
)
def test_what_contradicts_it_is_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        SamplingParams(**{"trace_decode_token_ids": TRACE, **fields})


def test_a_token_that_there_is_not_fails_alone(engine: LLM):
    params = [SamplingParams(trace_decode_token_ids=[5, 400]), SamplingParams(trace_decode_token_ids=[5])]
    bad, good = engine.generate([PROMPT] * 2, params, use_tqdm=False, on_error="return")
    assert "trace_decode_token_ids contains out-of-vocabulary token ids [400]" in (bad.error or "")
    assert list(good.outputs[0].token_ids) == [5]
