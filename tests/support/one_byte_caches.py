"""Engines whose KV cache is in 8 bits, each beside one more capability, in a process that has two virtual devices.

``python -m support.one_byte_caches FOLDER`` prints one JSON object: by name, what each engine answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from support.offloading import asked_again, prompt
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM, SamplingParams

SHORT: dict[str, Any] = {
    **SMALL,
    "max_model_len": 128,
    "block_size": 8,
    "num_gpu_blocks_override": 24,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
}
PATTERN = "(ab|cd|fg){2,9}"
PLAIN = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
HELD = SamplingParams(temperature=0, max_tokens=20, logprobs=0, structured_outputs={"regex": PATTERN})
#: each as it is, and held to a grammar
REQUESTS = [(prompt(number), params) for number in (5, 6, 7) for params in (PLAIN, HELD)]


def told(llm: LLM, requests: list[Any]) -> list[Any]:
    """Of each request its token ids, its text and its log-probabilities, to the bit."""
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "logprobs": [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs or []],
        }
        for output in outputs
    ]


def alone(llm: LLM) -> list[Any]:
    return [told(llm, [request])[0] for request in REQUESTS]


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    model = Path(sys.argv[1]) / "model"
    model.mkdir()
    write_tiny_model(model)
    found: dict[str, Any] = {}
    with LLM(model, kv_cache_dtype="int8", deterministic=True, kv_offloading_size="1MB", **SHORT) as llm:
        found["beside"] = told(llm, REQUESTS)
        found["offloading"] = asked_again(llm)
        found["alone"] = alone(llm)
        # leaves nothing of them on the device
        llm.generate([prompt(number) for number in (1, 2, 3)], PLAIN, use_tqdm=False)
        with llm.trace() as trace:
            found["from the host"] = alone(llm)
        found["blocks that came back"] = sum(step.num_blocks_in for step in trace.steps)
    with LLM(model, kv_cache_dtype="int8", data_parallel_size=2, **SHORT) as llm:
        found["replicas"] = told(llm, REQUESTS)
        found["bytes per token"] = llm.memory_plan.kv_bytes_per_token
    texts = ["one", "two and two", "a longer line that fills more than one block of the cache"]
    for dtype in ("auto", "int8"):
        with LLM(model, runner="pooling", convert="embed", kv_cache_dtype=dtype, **SHORT) as llm:
            found[f"pooling, {dtype}"] = [o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
