"""Pictures beside every other capability: ``python -m support.image_pairs FOLDER`` prints one JSON object, by engine,
of what each request got. An engine with a setting on answers as the plain one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.tiny_vl_model import PICTURE, picture, write_tiny_vl_model

from jaxllm import LLM, SamplingParams

PLAIN: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 200,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 28,
    "block_size": 8,
    "num_gpu_blocks_override": 60,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
#: engines by name -> their arguments
ENGINES: dict[str, dict[str, Any]] = {
    # the first engine makes as many devices as the others need
    "split, prefixes, preemption": {
        "tensor_parallel_size": 2,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 27,
    },
    "plain": {},
    "several decode steps": {"num_decode_steps": 3, "enforce_eager": False, "max_num_batched_tokens": 16},
    "replicas, deterministic, priorities": {
        "data_parallel_size": 2,
        "deterministic": True,
        "scheduling_policy": "priority",
        "max_num_active_seqs": 3,
    },
}
#: option of a request -> its parameters
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"temperature": 1.3, "top_p": 0.95, "seed": 11},
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
    "structured outputs": {"temperature": 0.0, "structured_outputs": {"regex": "(ab|cd|fg){2,9}"}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": list(range(100))},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 0},
}
#: text with "@" for each picture -> their sizes
PROMPTS = {"what is @ here?": [(100, 70)], "@ and @": [(70, 98), (33, 300)], "a large @": [(500, 400)], "a text": []}


def prompt(text: str) -> dict[str, Any]:
    pictures = [picture(*size) for size in PROMPTS[text]]
    return {"prompt": text.replace("@", PICTURE), **({"multi_modal_data": {"image": pictures}} if pictures else {})}


def answers(llm: LLM) -> list[Any]:
    asked = [(prompt(text), SamplingParams(max_tokens=16, ignore_eos=True, **kind))
             for text in PROMPTS for kind in KINDS.values()]  # fmt: skip
    outputs = llm.generate([each for each, _ in asked], [params for _, params in asked], use_tqdm=False)
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def main(folder: Path) -> None:
    model = write_tiny_vl_model(folder)
    found: dict[str, Any] = {}
    for name, arguments in ENGINES.items():
        with LLM(model, **{**PLAIN, **arguments}) as llm:
            found[name] = answers(llm)
            if name == "plain":
                llm.sleep(1)
                llm.wake_up()
                found["after a sleep"] = answers(llm)
                llm.save(folder / "saved")
    with LLM(folder / "saved", **PLAIN) as llm:
        found["saved and read"] = answers(llm)
    with LLM(model, **PLAIN, limit_mm_per_prompt={"image": 0, "video": 0}) as llm:
        (output,) = llm.generate(
            "a text", SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.0), use_tqdm=False
        )
        found["text without the tower"] = list(output.outputs[0].token_ids)
        (output,) = llm.generate([prompt("a large @")], use_tqdm=False, on_error="return")
        found["a picture without the tower"] = output.error
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
