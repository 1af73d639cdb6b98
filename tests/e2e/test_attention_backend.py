"""The engine with the GPU's kernels, interpreted: the tokens are those of the engine without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.programs import Programs
from pallas_kernels.backend import Backend

ENGINE = dict(dtype="float32", max_model_len=128, max_num_seqs=2, max_num_batched_tokens=8, seed=1)
PROMPTS = ["a", "an unusually long prompt, which takes more than one step", "two words", "the fourth"]


def test_greedy_tokens_are_those_of_xla(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(tiny_model, **ENGINE) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    used: list[Bucket] = []
    pick = Programs.bucket

    def bucket(programs: Programs, num_tokens: int, num_seqs: int, *, adapters: bool = False) -> Bucket:
        used.append(pick(programs, num_tokens, num_seqs, adapters=adapters))
        return used[-1]

    monkeypatch.setattr(Programs, "bucket", bucket)
    monkeypatch.setattr(
        "jaxllm.startup.setup.attention_backend", lambda *_: Backend(implementation="triton", interpret=True)
    )
    with LLM(tiny_model, **ENGINE) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert tokens == expected
    assert {bucket.decode_only for bucket in used} == {True, False}


def test_kernels_of_a_gpu_are_refused_without_one(tiny_model: Path):
    with pytest.raises(ValidationError, match="needs an NVIDIA GPU of compute capability 8.0"):
        LLM(tiny_model, attention_backend="triton", device="cpu", **ENGINE)


def test_plain_xla_can_be_asked_for(tiny_model: Path):
    with LLM(tiny_model, attention_backend="xla", enforce_eager=True, **ENGINE) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0].token_ids
