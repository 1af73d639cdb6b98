"""Models whose text is quantized see pictures as those do whose matrices are the same numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.image_answers import PICTURES, drawn, prompt
from support.quantized_checkpoints import quantized
from support.seeing_models import write_seeing_model

from jaxllm import LLM, SamplingParams

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.thorough

#: family -> formats of its text
FORMATS = {
    "qwen2_5_vl": ("awq", "gptq 4 bits", "packed 8 bits", "nf4"),
    "gemma3": ("gptq 4 bits",),
    "llava-next": ("awq",),
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 200,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 28,
    "block_size": 8,
    "num_gpu_blocks_override": 60,
    "enforce_eager": True,
}
#: the towers, and what is behind them, stay as they are
LEFT_OUT = ("lm_head", "visual", "vision_tower", "multi_modal_projector")
TEXTS = list(PICTURES)[:4]


@pytest.mark.parametrize("family", FORMATS)
def test_answers_are_those_of_the_same_numbers(family: str, tmp_path: Path):
    (tmp_path / "dense").mkdir()
    write_seeing_model(tmp_path / "dense", family)
    asked = [prompt(family, text, *given) for text, given in drawn({text: PICTURES[text] for text in TEXTS}).items()]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)

    def answers(model: Path) -> list[Any]:
        with LLM(model, **ARGUMENTS) as llm:
            return [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]

    for form in FORMATS[family]:
        ours = answers(quantized(tmp_path, form, LEFT_OUT))
        for own, same in zip(ours, answers(tmp_path / "dense"), strict=True):
            assert own.token_ids == same.token_ids
            assert own.cumulative_logprob == pytest.approx(same.cumulative_logprob, abs=1e-3)
