"""Engines that read a GGUF file in its blocks, embedding and head too, over virtual devices in a process of its own.

``python -m support.gguf_tables FOLDER`` prints one JSON object: by the engine, what it answered. With ``forms`` behind
it the file's layers have matrices of different types, and the engines other settings.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gguf import GGMLQuantizationType
from support.drafts import checks_that_cost
from support.gguf_files import VOCAB, hf_weights, write_gguf

from jaxllm import LLM, SamplingParams
from jaxllm.api.metric import Counter
from jaxllm.layers import linear
from jaxllm.models.segments import segment_sizes
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
#: of a file whose layers have several forms and are scanned together
OF_FORMS: dict[str, dict[str, Any]] = {
    "two devices": {"tensor_parallel_size": 2},
    "plain": {},
    "preemption, KV offloading": {"num_gpu_blocks_override": 11, "kv_offloading_size": "2MB"},
    "own drafts, several decode steps": {
        "speculative_config": {"method": "draft_model", "num_speculative_tokens": 2},
        **{"num_decode_steps": 2, "enforce_eager": False, "num_gpu_blocks_override": 11, "max_num_batched_tokens": 8},
    },
}


def form(name: str) -> GGMLQuantizationType:
    """As files of Q4_K_M have it: values and the matrix that leads down, of half of the layers, in more bits."""
    more = re.search(r"layers\.1\..*(v_proj|down_proj)", name) is not None
    return GGMLQuantizationType.Q8_0 if more or "embed" in name else GGMLQuantizationType.Q4_0


def answers(llm: LLM) -> dict[str, Any]:
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], SCORED, use_tqdm=False)
    entries: Any = output.prompt_logprobs
    return {
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [entry[token].logprob for token, entry in zip(PROMPT[1:], entries[1:], strict=True)],
    }


def of_forms(folder: Path) -> dict[str, Any]:
    file = write_gguf(folder / "forms.gguf", "llama", hf_weights("llama", tied=True, head_dim=16), form)
    prompts = [{"prompt_token_ids": PROMPT[start:]} for start in (0, 7, 19)]
    params = SamplingParams(temperature=0.0, max_tokens=13, ignore_eos=True, detokenize=False)
    found = {}
    for name, how in OF_FORMS.items():
        with (
            LLM(file, **{**ARGUMENTS, **how}, quantization="gguf") as llm,
            # whatever is drafted is checked
            checks_that_cost(llm, 0.0) if "speculative_config" in how else contextlib.nullcontext(),
        ):
            calls = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
            found[name] = {
                "tokens": [[list(output.outputs[0].token_ids) for output in outputs] for outputs in calls],
                "segments": llm.apply_model(segment_sizes)[0],
                "counters": {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)},
            }
    return found


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    # the prompt's matrices are widened in pieces; single tokens have kernels
    linear.PIECE = 24 * 64
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["forms"]:
        print(json.dumps(of_forms(folder)))
        return
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
