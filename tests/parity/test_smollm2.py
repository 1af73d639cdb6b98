"""Real weights, end to end: greedy tokens and log-probabilities of SmolLM2-135M-Instruct against transformers.

``data/smollm2_greedy_transformers.json`` holds, for 20 prompts, the ids of 64 tokens that transformers generates one
prompt at a time in float32, and the distance between the two highest logits at each.
``python tests/parity/test_smollm2.py FILE.gguf`` writes it anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.api.outputs import RequestOutput
from jaxllm.weights.formats.gguf import GGUFReader

RECORDED = Path(__file__).parent.parent / "data" / "smollm2_greedy_transformers.json"
#: closer logits may be ordered either way by rounding
TOLERANCE = 1e-3
NUM_TOKENS = 64
#: of the recorded prompts, compared with transformers as it is installed
LIVE = (1, 6, 13)
#: those that are also asked for in a small batch: the shortest and the longest one, a conversation, code, white space,
#: and characters of several tokens
SOME = (0, 17, 14, 7, 10, 12, 15)

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    "Hello",
    "The capital of France is",
    "1, 1, 2, 3, 5, 8,",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    CHAT.format("What is gravity?"),
    CHAT.format("Write a haiku about the sea."),
    CHAT.format("List three prime numbers and explain why they are prime."),
    CHAT.format("Translate to French: Good morning, my friends!"),
    "<|im_start|>system\nYou answer in one word.<|im_end|>\n" + CHAT.format("Is water wet?"),
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows: int, columns: int):\n",
    '{"name": "Ada", "born": 1815, "languages": [',
    "日本の首都は東京です。フランスの首都は",
    "Ein Satz auf Deutsch:",
    "🙂🙃 emoji 🎉",
    "   indented\n\n\n\tand    spaced     text",
    "A" * 60,
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Q: What is 17 * 23?\nA:",
    "Dear Sir or Madam,\n\nI am writing to complain about",
]
#: how many of them are asked for at once -> which
ASKED = {20: tuple(range(len(PROMPTS))), 7: SOME, 1: SOME[:3]}


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return json.loads(RECORDED.read_text())["prompts"]


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(smollm2_gguf, dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=16) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    return load_reference(smollm2_gguf)


def load_reference(path: Path) -> Any:
    """transformers' Llama with the file's weights (`tests/unit/test_gguf.py` compares these with its own reader's)."""
    import torch
    import transformers

    with GGUFReader(path) as reader:
        weights = {name: torch.from_numpy(reader.read(name).astype(np.float32)) for name in reader.names()}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**reader.config()))
    missing, unexpected = model.float().load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, "the head is the embedding"
    return model.eval()


def reference_logits(model: Any, prompt: list[int], generated: list[int]) -> Any:
    """float32 [len(generated), V]: what transformers chooses each of the generated tokens from."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1].float()


def test_the_recorded_prompts_are_these(engine: LLM, recorded: list[dict[str, Any]]):
    assert [entry["prompt"] for entry in recorded] == PROMPTS
    tokenizer = engine.get_tokenizer()
    assert [entry["prompt_token_ids"] for entry in recorded] == [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert all(len(entry["token_ids"]) == NUM_TOKENS for entry in recorded)


@pytest.mark.parametrize(
    "batch", [pytest.param(batch, marks=() if batch == 7 else pytest.mark.thorough) for batch in ASKED]
)
def test_greedy_tokens(engine: LLM, recorded: list[dict[str, Any]], batch: int):
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    # the smaller the batch, the longer a prompt takes; of the largest one some wait until others have ended
    asked = [recorded[i] for i in ASKED[batch]]
    for first in range(0, len(asked), batch):
        entries = asked[first : first + batch]
        outputs = engine.generate([entry["prompt"] for entry in entries], params, use_tqdm=False)
        for entry, output in zip(entries, outputs, strict=True):
            ours, theirs = output.outputs[0].token_ids, entry["token_ids"]
            assert len(ours) == NUM_TOKENS
            if ours != theirs:
                at = next(i for i in range(NUM_TOKENS) if ours[i] != theirs[i])
                assert entry["gaps"][at] <= TOLERANCE, f"{entry['prompt']!r} differs at token {at}"


def test_the_recording_is_what_transformers_says_today(reference: Any, recorded: list[dict[str, Any]]):
    for entry in (recorded[i] for i in LIVE):
        logits = reference_logits(reference, entry["prompt_token_ids"], entry["token_ids"])
        gaps = logits.topk(2).values.diff().abs()[:, 0]
        for i, (token, likeliest) in enumerate(zip(entry["token_ids"], logits.argmax(-1).tolist(), strict=True)):
            assert token == likeliest or gaps[i] <= TOLERANCE
            assert abs(float(gaps[i]) - entry["gaps"][i]) <= TOLERANCE


def test_logprobs(engine: LLM, reference: Any):
    params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5, prompt_logprobs=4),
        SamplingParams(temperature=1.5, seed=7, max_tokens=6, ignore_eos=True, logprobs=20, prompt_logprobs=0),
        SamplingParams(temperature=0.7, seed=8, max_tokens=6, ignore_eos=True, logprobs=0, presence_penalty=1.0),
    ]
    outputs = engine.generate([PROMPTS[i] for i in LIVE], params, use_tqdm=False)
    ranks = set()
    for output, param in zip(outputs, params, strict=True):
        (completion,) = output.outputs
        logits = reference_logits(reference, output.prompt_token_ids, completion.token_ids)
        expected = logits.log_softmax(-1)
        check_prompt_logprobs(output, reference)
        assert completion.logprobs is not None and len(completion.logprobs) == 6
        total = 0.0
        for row, token, position in zip(expected, completion.token_ids, completion.logprobs, strict=True):
            for other, logprob in position.items():
                assert logprob.logprob == pytest.approx(float(row[other]), abs=1e-4)
                assert logprob.rank == 1 + int((row > row[other]).sum())
                assert logprob.decoded_token == engine.get_tokenizer().decode([other])
            top = row.topk(param.logprobs or 1).indices.tolist()[: param.logprobs]
            assert set(position) == {token, *top}
            assert [t for t, _ in sorted(position.items(), key=lambda pair: pair[1].rank or 0) if t in top] == top
            total += position[token].logprob
            ranks.add(position[token].rank)
        assert completion.cumulative_logprob == pytest.approx(total)
    assert ranks > {1}, "some sampled token is not the likeliest"


def test_structured_outputs(engine: LLM):
    """A real vocabulary, whose tokens run across the borders of what a grammar knows."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
        "required": ["city", "inhabitants"],
        "additionalProperties": False,
    }
    asked = [
        ("Describe Paris as JSON.", {"json": schema}),
        ("Is the sky blue? Answer with yes or no.", {"choice": ["yes", "no"]}),
        ("When did the second world war end? Answer with a year.", {"regex": r"(18|19|20)\d{2}"}),
        ("Is the sky blue?", None),
    ]
    params = [SamplingParams(temperature=0, max_tokens=48, structured_outputs=constraint) for _, constraint in asked]
    prompts = [CHAT.format(question) for question, _ in asked]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    place, answer, year, free = (output.outputs[0].text for output in outputs)
    assert [output.outputs[0].finish_reason for output in outputs[:3]] == ["stop"] * 3
    jsonschema.validate(json.loads(place), schema)
    assert "Paris" in place and answer in ("yes", "no") and re.fullmatch(r"(18|19|20)\d{2}", year)
    assert free == engine.generate(prompts[3], params[3], use_tqdm=False)[0].outputs[0].text


def check_prompt_logprobs(output: RequestOutput, reference: Any) -> None:
    if output.prompt_logprobs is None:
        return
    tokens = output.prompt_token_ids
    expected = reference_logits(reference, tokens[:1], tokens[1:]).log_softmax(-1)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(tokens) > 3
    for row, token, position in zip(expected, tokens[1:], output.prompt_logprobs[1:], strict=True):
        assert position is not None and token in position
        for other, logprob in position.items():
            assert logprob.logprob == pytest.approx(float(row[other]), abs=1e-4)
            assert logprob.rank == 1 + int((row > row[other]).sum())


def record(path: Path) -> None:
    """Write `RECORDED`."""
    import torch
    import transformers

    from jaxllm.tokenization.load import load_tokenizer

    model, tokenizer = load_reference(path), load_tokenizer(path)
    entries = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        past, given, tokens, gaps = None, ids, [], []
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                output = model(torch.tensor([given]), past_key_values=past, use_cache=True)
            past, (best, second) = output.past_key_values, output.logits[0, -1].topk(2).values
            given = [int(output.logits[0, -1].argmax())]
            tokens += given
            gaps.append(round(float(best - second), 6))
        entries.append({"prompt": prompt, "prompt_token_ids": ids, "token_ids": tokens, "gaps": gaps})
    oracle = f"transformers {transformers.__version__}, LlamaForCausalLM, float32, torch {torch.__version__}"
    text = json.dumps({"oracle": oracle, "prompts": entries}, ensure_ascii=False, separators=(",", ":"))
    RECORDED.write_text(text.replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
