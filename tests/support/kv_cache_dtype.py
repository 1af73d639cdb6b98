"""An engine of a small GPT-OSS, with sinks and windows, whose KV cache is int8: over four virtual devices, two of which
have a stage, in a process with its own JAX.

``python -m support.kv_cache_dtype FOLDER`` prints one JSON object: what it answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.latent_cache import answers, write_random
from support.sinks import DEVICES, GPT_OSS
from support.tensor_parallel import ARGUMENTS

from jaxllm import LLM


def main() -> None:
    folder = Path(sys.argv[1])
    write_random(folder, GPT_OSS)
    with LLM(folder, **{**ARGUMENTS, **DEVICES}, kv_cache_dtype="int8") as llm:
        said = [layout.device_bytes for layout in llm.explain().layouts if layout.name.startswith("KV cache")]
        found = {**answers(llm), "said": said, "planned": llm.memory_plan.kv_cache_bytes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
