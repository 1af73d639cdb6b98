"""Engines of a small model whose matrices and experts CPU kernels multiply by, on one and on two devices.

``python -m support.kernels_of_experts FOLDER`` prints one JSON object: by name, what each engine answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from support.expert_parallel import write_model
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from pallas_kernels.packed_matmul import cpu_ffi

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPTS = ["one", "two and two", "a longer line that fills more than one block of the cache"]


def answers(llm: LLM) -> list[Any]:
    """Of each prompt the token ids and their log-probabilities."""
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    return [
        [list(one.token_ids), [next(iter(entry.values())).logprob for entry in one.logprobs or []]] for one in outputs
    ]


def has_kernels(llm: LLM) -> bool:
    runner: Any = llm.engine.runner
    backend = runner.head.programs.config.context.backend
    assert bool(backend.cpu_kernels) == bool(backend.cpu_grouped)
    return bool(backend.cpu_grouped)


def others(params: Any) -> Any:
    """Other weights: what has no integers, scales among it, is smaller."""
    return jax.tree.map(lambda array: array * 0.75 if jnp.issubdtype(array.dtype, jnp.floating) else array, params)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    model = Path(sys.argv[1]) / "model"
    write_model(model)
    # as few shapes of steps as there can be
    few: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": 2**20}
    arguments: dict[str, Any] = {**SMALL, **few, "quantization": "int8"}
    found: dict[str, Any] = {}
    with LLM(model, tensor_parallel_size=2, **arguments) as llm:
        found["kernels"], found["has kernels"] = answers(llm), has_kernels(llm)
        own = llm.apply_model(lambda params: params)[0]
        llm.update_weights(others(own))
        found["other weights"] = answers(llm)
        llm.update_weights(own)
        found["own weights"] = answers(llm)
    with LLM(model, tensor_parallel_size=2, enable_expert_parallel=True, **arguments) as llm:
        found["whole experts"] = answers(llm)
    no_kernels = mock.patch.multiple(cpu_ffi, load=lambda *_: "", load_grouped=lambda *_: "")
    with no_kernels, LLM(model, **arguments) as llm:
        found["XLA"], found["XLA's kernels"] = answers(llm), has_kernels(llm)
        llm.update_weights(others(llm.apply_model(lambda params: params)[0]))
        found["other weights by XLA"] = answers(llm)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
