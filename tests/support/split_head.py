"""An EAGLE-3 head and its model on one device and over two, in a process that has JAX to itself.

``python -m support.split_head FOLDER`` prints one JSON object: by number of devices, the tokens of each request, and
how many drafts there were and how many were right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.drafts import checks_that_cost, counted
from support.eagle_head import write_eagle3
from support.tiny_model import write_tiny_model

from jaxllm import LLM, SamplingParams

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 8,
    "num_gpu_blocks_override": 40,
    "async_scheduling": False,
}
#: few tokens are likely, so that drafts are right now and then
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={20: 40.0, 40: 40.0})


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "model").mkdir()
    model, head = write_tiny_model(folder / "model"), write_eagle3(folder / "head")
    drafts = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 2}
    found: dict[str, Any] = {}
    for devices in (2, 1):  # the first engine makes as many devices as the other needs
        arguments = {**ARGUMENTS, "tensor_parallel_size": devices, "speculative_config": drafts}
        with LLM(model, **arguments) as llm, checks_that_cost(llm, 0.0):
            outputs = [llm.generate(text, GREEDY, use_tqdm=False)[0] for text in ("one", "a longer text", "a longer")]
            found[str(devices)] = {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "drafts": [counted(llm, "num_draft_tokens"), counted(llm, "num_accepted_tokens")],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
