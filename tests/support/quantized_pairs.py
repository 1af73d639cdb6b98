"""Engines whose weights are quantized, with many settings on, beside one that has the same numbers in float32, in a
process that has JAX to itself.

``python -m support.quantized_pairs FOLDER FORMAT`` prints one JSON object: by engine, what was answered.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from support.adapters import ADAPTERS, save_adapter
from support.pairs import COUNTED
from support.quantized_checkpoints import quantized, write
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.lora_request import LoRARequest
from jaxllm.speculative import adaptive

PROMPTS = ["one", "two and two are", "a longer line that fills more than one block of it"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
#: kind of request -> its parameters
KINDS: dict[str, dict[str, Any]] = {
    "plain": GREEDY,
    "seeded": {**GREEDY, "temperature": 1.0, "seed": 3},
    "structured outputs": {**GREEDY, "structured_outputs": {"regex": "(ab|cd|fg){2,9}"}, "ignore_eos": False},
}
#: engine -> its arguments, beside who drafts
ENGINES: dict[str, dict[str, Any]] = {
    "split": {"tensor_parallel_size": 2, "enable_lora": True, "max_lora_rank": 8},
    "stages": {"pipeline_parallel_size": 2, "kv_cache_dtype": "float32"},
    # all layers; blocks for one request
    "offloading": {"cpu_offload_gb": 1, "kv_offloading_size": "2MB", "num_gpu_blocks_override": 14},
    "deterministic": {"deterministic": True},
    "float32": {"enable_lora": True, "max_lora_rank": 8},
}
DRAFTS: dict[str, Any] = {"num_speculative_tokens": 1}


def answers(llm: LLM, kinds: list[str], adapter: LoRARequest | None = None) -> dict[str, Any]:
    """By kind: (tokens, their log-probability) of each prompt."""
    found = {}
    for kind in kinds:
        outputs = llm.generate(PROMPTS, SamplingParams(**KINDS[kind]), lora_request=adapter, use_tqdm=False)
        found[kind] = [(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in outputs]
    return found


def main() -> None:
    folder, form = Path(sys.argv[1]), sys.argv[2]
    stored, dense = write(folder, form)
    (folder / "drafts").mkdir()
    shutil.copytree(dense, folder / "drafts" / "dense")
    drafter = quantized(folder / "drafts", "awq", ("lm_head",))
    adapter = LoRARequest("all", 1, str(save_adapter(dense, folder / "adapter", **ADAPTERS["all"])))
    # whatever is drafted is checked
    adaptive.CPU_CHECK = adaptive.CPU_ROWS = adaptive.CPU_FEW_ROWS = 0.0
    drafts: dict[str, dict[str, Any]] = {
        "split": {"method": "ngram", "prompt_lookup_min": 1},
        "offloading": {"method": "draft_model", "model": str(drafter)},
    }
    found: dict[str, Any] = {}
    # the engine over several devices comes first: what JAX has cannot be changed later
    for name, own in ENGINES.items():
        arguments = {**SMALL, "max_model_len": 96, "max_num_batched_tokens": 16, "block_size": 8, **own}
        if name in drafts:
            arguments |= {"speculative_config": {**drafts[name], **DRAFTS}, "enforce_eager": False}
        model = {"float32": dense, "offloading": folder / "kept"}.get(name, stored)
        with LLM(model, **arguments) as llm:
            found[name] = answers(llm, list(KINDS))
            if "enable_lora" in own:
                found[name]["adapted"] = answers(llm, ["plain"], adapter)["plain"]
            llm.sleep(1)
            llm.wake_up()
            found[name]["after sleep"] = answers(llm, ["plain"])["plain"]
            for kind, metric in COUNTED.items():
                found[name][kind] = sum(one.value for one in llm.get_metrics() if one.name == metric)  # pyright: ignore
            if name == "split":
                llm.save(folder / "kept", format="orbax")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
