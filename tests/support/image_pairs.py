"""Pictures beside every other capability: ``python -m support.image_pairs FOLDER`` prints one JSON object, by engine,
of what each request got. An engine with a setting on answers as the plain one. In a folder "gemma3" it is Gemma 3's.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from support.drafts import checks_that_cost
from support.eagle_head import write_eagle3
from support.seeing_models import PICTURE, VOCAB_SIZE, picture, write_seeing_model

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.api.metric import Counter

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
#: blocks that are fewer than requests fill together; of Gemma 3, which has two groups of layers
FEW, FEW_OF_TWO_GROUPS = 27, 34
#: of engines that check drafts
CHECKS: dict[str, Any] = {"enforce_eager": False, "max_num_batched_tokens": 32}
#: engines by name -> their arguments
ENGINES: dict[str, dict[str, Any]] = {
    # the first engine makes as many devices as the others need
    "stages, each split": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_prefix_caching": True},
    "stages": {"pipeline_parallel_size": 2, "num_gpu_blocks_override": 16, "max_model_len": 112},
    "split, prefixes, preemption": {
        "tensor_parallel_size": 2,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 16,
        "max_model_len": 112,
    },
    "plain": {},
    "several decode steps": {"num_decode_steps": 3, "enforce_eager": False, "max_num_batched_tokens": 16},
    "drafts": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1},
        **CHECKS,
    },
    "drafts of earlier outputs": {"speculative_config": {"method": "suffix", "num_speculative_tokens": 2}, **CHECKS},
    # its text part in 4 bits takes what pictures became; a model of its own reads the prompt's tokens; layers behind it
    # take what the model made of both
    "drafts of itself": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}, **CHECKS},
    "drafts of another model": {
        "speculative_config": {"method": "draft_model", "model": "MODEL", "num_speculative_tokens": 2},
        "enable_prefix_caching": True,
        **CHECKS,
    },
    "drafts of layers": {
        "speculative_config": {"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 2},
        "enable_prefix_caching": True,
        **CHECKS,
    },
    "host blocks, offloaded weights": {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": FEW,
        "kv_offloading_size": "2MB",
        "cpu_offload_gb": 1,
    },
    "replicas, deterministic, priorities": {
        "data_parallel_size": 2,
        "deterministic": True,
        "scheduling_policy": "priority",
        "max_num_active_seqs": 3,
    },
}
#: what families differ in is in the others
OF_QWEN = ("stages", "drafts of earlier outputs", "drafts of another model", "drafts of layers")


def engines(family: str) -> list[str]:
    return [name for name in ENGINES if family != "gemma3" or name not in OF_QWEN]


#: option of a request -> its parameters
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"temperature": 1.3, "top_p": 0.95, "seed": 11},
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
    "structured outputs": {"temperature": 0.0, "structured_outputs": {"regex": "(ab|cd|fg){2,9}"}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": list(range(100))},
    # which is easily guessed
    "one token": {"temperature": 0.0, "allowed_token_ids": [66]},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 0},
}
#: text with "@" for each picture -> their sizes
PROMPTS = {"what is @ here?": [(100, 70)], "@ and @": [(70, 98), (33, 300)], "a large @": [(500, 400)], "a text": []}


#: what is counted of an engine -> its metric
COUNTED = {
    "preemptions": "vllm:num_preemptions",
    "hits on the host": "vllm:external_prefix_cache_hits",
    "drafts": "vllm:spec_decode_num_draft_tokens",
    "right drafts": "vllm:spec_decode_num_accepted_tokens",
}


def counted(llm: LLM) -> dict[str, float]:
    found = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    return {name: found.get(metric, 0) for name, metric in COUNTED.items()}


def prompt(text: str, mark: str) -> dict[str, Any]:
    pictures = [picture(*size) for size in PROMPTS[text]]
    return {"prompt": text.replace("@", mark), **({"multi_modal_data": {"image": pictures}} if pictures else {})}


def answers(llm: LLM, mark: str) -> list[Any]:
    asked = [(prompt(text, mark), SamplingParams(max_tokens=16, ignore_eos=True, **kind))
             for text in PROMPTS for kind in KINDS.values()]  # fmt: skip
    outputs = llm.generate([each for each, _ in asked], [params for _, params in asked], use_tqdm=False)
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def main(folder: Path) -> None:
    family = "gemma3" if folder.name.startswith("gemma3") else "qwen2_5_vl"
    model, mark = write_seeing_model(folder, family), PICTURE[family]
    places = {"MODEL": str(model), "HEAD": str(write_eagle3(folder / "head", vocab=VOCAB_SIZE))}
    found: dict[str, Any] = {}
    for name in engines(family):
        arguments = ENGINES[name]
        drafts = arguments.get("speculative_config")
        if drafts and "model" in drafts:
            arguments = {**arguments, "speculative_config": {**drafts, "model": places[drafts["model"]]}}
        if family == "gemma3" and "num_gpu_blocks_override" in arguments:
            arguments = {**arguments, "num_gpu_blocks_override": FEW_OF_TWO_GROUPS}
        with LLM(model, **{**PLAIN, **arguments}) as llm, checks_that_cost(llm, 0.0) if drafts else nullcontext():
            found[name] = answers(llm, mark)
            if name == "plain":
                llm.sleep(1)
                llm.wake_up()
                found["after a sleep"] = answers(llm, mark)
                llm.save(folder / "saved")
            # what was computed once comes from the host
            if name.startswith("host blocks") and answers(llm, mark) != found[name]:
                found[name] = "others, the second time"
            found[f"{name}: counted"] = counted(llm)
            if name == "stages":
                plans = llm.memory_plan, jaxllm.plan(model, **{**PLAIN, **arguments}).memory
                found["planned"] = [plan.encoder_activation_bytes for plan in plans]
    with LLM(folder / "saved", **PLAIN) as llm:
        found["saved and read"] = answers(llm, mark)
    with LLM(model, **PLAIN, limit_mm_per_prompt={"image": 0, "video": 0}) as llm:
        (output,) = llm.generate(
            "a text", SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.0), use_tqdm=False
        )
        found["text without the tower"] = list(output.outputs[0].token_ids)
        (output,) = llm.generate([prompt("a large @", mark)], use_tqdm=False, on_error="return")
        found["a picture without the tower"] = output.error
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
