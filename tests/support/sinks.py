"""An engine of a small GPT-OSS, with sinks, windows and biases of experts, over four virtual devices, with a KV cache
in int8, in a process with its own JAX.

``python -m support.sinks FOLDER`` prints one JSON object: what it answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.latent_cache import answers, write_random
from support.tiny_model import CONFIG
from support.ways import WAYS_ARGUMENTS, counted, every_way

from jaxllm import LLM

GPT_OSS: dict[str, Any] = {
    **CONFIG,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": True,
}
DEVICES = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
#: of keys and values
KV_CACHE_DTYPE = "int8"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "model").mkdir()
    write_random(folder / "model", GPT_OSS)
    with LLM(folder / "model", **{**WAYS_ARGUMENTS, **DEVICES}, kv_cache_dtype=KV_CACHE_DTYPE) as llm:
        layouts = llm.explain().layouts
        cache = [layout.device_bytes for layout in layouts if layout.name.startswith("KV cache")]
        found = {"cache": cache, "planned": llm.memory_plan.kv_cache_bytes}
        found |= {"load": counted(llm), **answers(llm), "ways": every_way(llm, folder / "model")}
        llm.save(folder / "saved")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
