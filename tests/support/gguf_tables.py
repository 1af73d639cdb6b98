"""Engines that read a GGUF file in its blocks, embedding and head too, over virtual devices in a process of its own.

``python -m support.gguf_tables FOLDER`` prints one JSON object: by the engine, what it answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gguf import GGMLQuantizationType
from support.gguf_files import VOCAB, hf_weights, write_gguf

from jaxllm import LLM, SamplingParams
from jaxllm.layers import linear
from jaxllm.weights.formats.gguf import GGUFReader
from pallas_kernels.quantized import is_quantized

PROMPT = [(7 * i + i * i) % VOCAB for i in range(50)]
SCORED = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=0, detokenize=False)
ARGUMENTS: dict[str, Any] = {
    **{"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "block_size": 8},
    **{"num_gpu_blocks_override": 24, "enforce_eager": True, "skip_tokenizer_init": True},
}
#: by name, how each is started; "widened" is what the others are compared with
ENGINES: dict[str, dict[str, Any]] = {
    "widened": {},
    "blocks": {"quantization": "gguf"},
    "two devices": {"quantization": "gguf", "tensor_parallel_size": 2},
    "two stages": {"quantization": "gguf", "pipeline_parallel_size": 2},
}


def answers(llm: LLM) -> dict[str, Any]:
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], SCORED, use_tqdm=False)
    entries: Any = output.prompt_logprobs
    return {
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [entry[token].logprob for token, entry in zip(PROMPT[1:], entries[1:], strict=True)],
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    # the prompt's matrices are widened in pieces; single tokens have kernels
    linear.PIECE = 24 * 64
    folder = Path(sys.argv[1])
    file = write_gguf(
        folder / "model.gguf", "llama", hf_weights("llama", tied=True, head_dim=16), GGMLQuantizationType.Q8_0
    )
    found: dict[str, Any] = {}
    for name, how in ENGINES.items():
        with LLM(file, **ARGUMENTS, **how) as llm:
            found[name] = {**answers(llm), "bytes": llm.memory_plan.weight_bytes}
            if name != "two stages":
                [params] = llm.apply_model(lambda params: params)
                found[name]["quantized"] = is_quantized(params.embedding)
            if name == "blocks":
                llm.update_weights(jax.tree.map(jnp.copy, params))
                found["updated"] = answers(llm)
                llm.save(folder / "saved", format="orbax")
    with LLM(folder / "saved", **ARGUMENTS, tensor_parallel_size=2) as llm:
        found["saved"] = answers(llm)
    with GGUFReader(file) as reader:
        found["file bytes"] = sum(
            reader.raw(name).nbytes if len(reader.shape(name)) == 2 else reader.read(name).nbytes
            for name in reader.names()
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
