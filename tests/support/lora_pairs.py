"""Adapters beside every setting of an engine, and in models of several families, in a process that has JAX to itself.

``python -m support.lora_pairs FOLDER [NAME ...]`` prints one JSON object: by setting or family, how far the answers'
log-probabilities are from PEFT's, and from those of the model without adapters.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.adapters import ADAPTERS, TABLES, Oracle, difference, save_adapter
from support.drafts import checks_that_cost
from support.eagle_head import write_eagle3
from support.quantized_checkpoints import write
from support.seeing_models import PICTURE, picture, write_seeing_model
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM, SamplingParams
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.metric import Counter

#: setting -> the engine's arguments
SETTINGS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "shared KV heads": {"tensor_parallel_size": 4},
    "pipeline and tensor parallel": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
    "data parallel": {"data_parallel_size": 2},
    "drafts": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 1},
        "enforce_eager": False,
        "max_num_batched_tokens": 8,
    },
    # a model that drafts has no adapters: its drafts are the base's
    "a model that drafts": {"enforce_eager": False, "max_num_batched_tokens": 8},
    "several decode steps": {"num_decode_steps": 3, "enforce_eager": False, "max_num_batched_tokens": 8},
    "preemption": {"num_gpu_blocks_override": 20},
    "KV offloading": {"kv_offloading_size": "2MB", "num_gpu_blocks_override": 20},
    "quantized weights": {"quantization": "awq"},
    "asynchronous scheduling": {"async_scheduling": True, "scheduling_policy": "priority"},
    "several replicas' parts": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "tables, pipeline and tensor parallel": {
        **{"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "lora_embeddings": True},
    },
}
#: those that compile much
LONG_SETTINGS: dict[str, dict[str, Any]] = {
    # nor has a head, which takes hidden states that the adapters have made
    "a head that drafts": {"enforce_eager": False, "max_num_batched_tokens": 8},
    "tables, several decode steps": {
        **{"num_decode_steps": 3, "enforce_eager": False, "max_num_batched_tokens": 8, "lora_embeddings": True},
    },
}
_ALL = {**SETTINGS, **LONG_SETTINGS}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
#: family -> transformers' class, its sizes, the modules with adapters
FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "qwen2": ("Qwen2", {}, "all-linear"),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, "all-linear"),
    "phi3": ("Phi3", {}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt-neox": ("GPTNeoX", {"hidden_size": 96}, ["query_key_value", "dense", "dense_h_to_4h"]),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16}, _ATTENTION),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, _ATTENTION),
    "deepseek": (
        "DeepseekV2",
        {
            **{"kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
            **{"num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
            **{"moe_intermediate_size": 20, "num_experts_per_tok": 2},
        },
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    ),
}
#: whose matrices PEFT finds as [in, out]
LONG_FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "gpt2": ("GPT2", {"n_inner": 80}, ["c_attn", "c_proj", "c_fc"]),
}
#: by a name, a family that sees pictures
PICTURES = {"pictures": "qwen2_5_vl", "pictures of Gemma 3": "gemma3", "pictures of LLaVA": "llava"}
IMAGE_LIMIT = {"count": 1, "width": 84, "height": 84}
PROMPT = "some text that begins alike, then goes its own way: "


def asked(
    model: Path,
    read: Path,
    adapters: dict[str, Path],
    arguments: dict[str, Any],
    prompts: list[Any],
    vocabulary: dict[str, Any],
) -> dict[str, Any]:
    """What an engine answers with each adapter and without, in one call."""
    oracle = Oracle(model, adapters)
    each = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)}
    names: list[str | None] = [None, *adapters]
    names = [names[i % len(names)] for i in range(len(prompts))]
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=1, ignore_eos=True, **vocabulary)
    own = {**SMALL, "max_model_len": 96, "block_size": 8, **arguments}
    with (
        LLM(read, **own, enable_lora=True, max_loras=2) as llm,
        # whatever is drafted is checked
        checks_that_cost(llm, 0.0) if "speculative_config" in own else contextlib.nullcontext(),
    ):
        requests = [None if name is None else each[name] for name in names]
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        counters = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    pairs = list(zip(names, outputs, strict=True))
    return {
        "difference": max(difference(oracle, name, output) for name, output in pairs),
        "from the base": max(difference(oracle, None, output) for name, output in pairs if name is not None),
        "counters": counters,
    }


def of_setting(name: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    model = read = write_tiny_model(folder)
    if name == "quantized weights":
        read, model = write(folder, "awq")
    each = enumerate((TABLES if _ALL[name].get("lora_embeddings") else ADAPTERS).items())
    adapters = {key: save_adapter(model, folder / key, seed=seed, **config) for seed, (key, config) in each}
    prompts = [PROMPT + str(i) * (1 + 5 * (i % 3)) for i in range(12)]
    arguments = dict(_ALL[name])
    if name == "a model that drafts":
        drafter = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 1}
        arguments["speculative_config"] = drafter
    if name == "a head that drafts":
        head = folder / "head"
        drafter = {"method": "eagle3", "model": str(write_eagle3(head)), "num_speculative_tokens": 1}
        arguments["speculative_config"] = drafter
    return asked(model, read, adapters, arguments, prompts, {})


def of_pictures(folder: Path, family: str) -> dict[str, Any]:
    """An adapter of the text of a model that sees pictures, against the same adapter merged into the model."""
    folder.mkdir()
    model, merged, adapter = (folder / name for name in ("model", "merged", "adapter"))
    model.mkdir()
    write_seeing_model(model, family)
    torch.manual_seed(5)
    base: Any = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    modules = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules))
    adapted.save_pretrained(str(adapter))
    shutil.copytree(model, merged)
    adapted.merge_and_unload().save_pretrained(folder / "made")
    shutil.copy(folder / "made" / "model.safetensors", merged / "model.safetensors")
    prompts = [
        {"prompt": f"{PICTURE[family]} what is it", "multi_modal_data": {"image": picture(56, 84)}},
        {"prompt": f"and {PICTURE[family]} this", "multi_modal_data": {"image": picture(28, 56, seed=2)}},
        "only text",
    ]
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=1, ignore_eos=True)

    def numbers(read: Path, lora_request: LoRARequest | None) -> list[float]:
        own = {"enable_lora": True} if lora_request is not None else {}
        arguments = {**SMALL, "max_num_batched_tokens": 64, "limit_mm_per_prompt": {"image": IMAGE_LIMIT}}
        with LLM(read, **arguments, **own) as llm:
            outputs = llm.generate(prompts, params, lora_request=lora_request, use_tqdm=False)
        return [output.outputs[0].cumulative_logprob or 0.0 for output in outputs]

    plain, ours = numbers(model, None), numbers(model, LoRARequest("own", 1, adapter))
    theirs = numbers(merged, None)
    return {
        "difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "from the base": max(abs(a - b) for a, b in zip(ours, plain, strict=True)),
        "counters": {},
    }


def of_family(name: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    kind, sizes, modules = {**FAMILIES, **LONG_FAMILIES}[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for array in model.parameters():
            if array.ndim > 1:
                array.mul_(4.0)
    model.save_pretrained(folder)
    adapters = {
        key: save_adapter(folder, folder / key, seed=rank, r=rank, lora_alpha=2, target_modules=modules)
        for key, rank in (("one", 3), ("other", 8))
    }
    prompts = [{"prompt_token_ids": [(7 * i + j) % 120 + 3 for j in range(5 + 4 * i)]} for i in range(6)]
    return asked(folder, folder, adapters, {"skip_tokenizer_init": True}, prompts, {"detokenize": False})


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    chosen = sys.argv[2:] or [*SETTINGS, *FAMILIES, *PICTURES]
    found = {}
    for name in chosen:
        place = Path(sys.argv[1]) / name.replace(" ", "-")
        if name in PICTURES:
            found[name] = of_pictures(place, PICTURES[name])
        else:
            found[name] = (of_setting if name in _ALL else of_family)(name, place)
    print(json.dumps(found))
