"""One side of the parity check: a model's greedy tokens and log-probabilities on the device that this process has.

``python -m gpu_check.parity_side FOLDER OUTPUT [--reference]``: the reference is the CPU's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import jax

from gpu_check.sizes import sizes
from jaxllm import LLM, SamplingParams


def prompts(vocab_size: int) -> list[list[int]]:
    """Random tokens; all that are long enough begin with the same ones."""
    size, draw = sizes(), random.Random(0)
    shared = [draw.randrange(vocab_size) for _ in range(size.parity_shared_prefix)]
    found = []
    for length in size.parity_prompts:
        own = [draw.randrange(vocab_size) for _ in range(length)]
        found.append([*shared, *own[len(shared) :]] if length > len(shared) else own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reference", action="store_true")
    arguments = parser.parse_args()
    vocab_size = json.loads((arguments.folder / "config.json").read_text())["vocab_size"]
    side = Side(arguments.folder, prompts(vocab_size))
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "platform": jax.devices()[0].platform}
    whole, texts, scores = side.whole()
    found["runs"] = {"whole prompts": whole}
    if not arguments.reference:
        found["runs"] |= side.chunked() | {"preempted": side.preempted()}
    found["scores"] = {"float32": scores, "bfloat16": side.bfloat16_scores(texts)}
    arguments.output.write_text(json.dumps(found))


class Side:
    """The engine's ways to the same tokens.

    Args:
        folder: the model's.
    """

    def __init__(self, folder: Path, prompts: list[list[int]]):
        self._folder, self._prompts = folder, prompts
        self._length = sizes().parity_output_len
        self._max_model_len = sizes().parity_max_model_len

    def _llm(self, **arguments: Any) -> LLM:
        common: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "max_model_len": self._max_model_len,
            "max_num_seqs": len(self._prompts),
            "block_size": 16,
            "enforce_eager": True,
        }
        return LLM(self._folder, **{**common, **arguments})

    def _generate(self, llm: LLM) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=self._length, ignore_eos=True, logprobs=2)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in self._prompts], params, use_tqdm=False)
        # between the two most likely tokens: what rounding must not exceed
        gaps = []
        for output in outputs:
            for position in output.outputs[0].logprobs or []:
                first, second = sorted((found.logprob for found in position.values()), reverse=True)[:2]
                gaps.append(first - second)
        counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
            "preemptions": counted["vllm:num_preemptions"],
            "least_gap": min(gaps),
        }

    def whole(self) -> tuple[dict[str, Any], list[list[int]], list[float]]:
        """Every prompt in one step; also prompts with their continuations, and how likely each token of them is."""
        with self._whole_llm("float32") as llm:
            found = self._generate(llm)
            texts = [[*prompt, *tokens] for prompt, tokens in zip(self._prompts, found["tokens"], strict=True)]
            return found, texts, _scores(llm, texts)

    def bfloat16_scores(self, texts: list[list[int]]) -> list[float]:
        with self._whole_llm("bfloat16") as llm:
            return _scores(llm, texts)

    def _whole_llm(self, dtype: str) -> LLM:
        total = sum(map(len, self._prompts))
        return self._llm(dtype=dtype, max_num_batched_tokens=total, enable_prefix_caching=False)

    def chunked(self) -> dict[str, dict[str, Any]]:
        """Prompts in pieces beside sequences that decode, through every compiled step; then again, from the cache."""
        with self._llm(
            dtype="float32", max_num_batched_tokens=sizes().parity_chunk, enforce_eager=jax.default_backend() == "cpu"
        ) as llm:
            return {"chunked prompts": self._generate(llm), "prefix hits": self._generate(llm)}

    def preempted(self) -> dict[str, Any]:
        """In a cache that holds the longest request and little more."""
        blocks = 2 + self._max_model_len // 16
        with self._llm(
            dtype="float32",
            max_num_batched_tokens=sizes().parity_chunk,
            num_gpu_blocks_override=blocks,
            enable_prefix_caching=False,
            scheduler_reserve_full_isl=False,
        ) as llm:
            return self._generate(llm)


def _scores(llm: LLM, texts: list[list[int]]) -> list[float]:
    """Log-probability of every token but the first of each text, one text after the other."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
    found: list[float] = []
    for ids, output in zip(texts, outputs, strict=True):
        positions = output.prompt_logprobs or []
        found += [scored[token].logprob for token, scored in zip(ids, positions, strict=True) if scored is not None]
    return found


if __name__ == "__main__":
    main()
