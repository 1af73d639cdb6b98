"""Engines whose model is split over 1, 2, 4 and 8 virtual devices, in a process that has JAX to itself.

``python -m support.tensor_parallel FOLDER`` prints one JSON object: by number of devices, what each engine answered.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from support.tiny_model import CONFIG, SMALL, write_tiny_model

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import JaxLLMError
from jaxllm.api.metric import Counter
from jaxllm.config.files import merged
from jaxllm.flax import to_nnx
from jaxllm.layers.weight import is_spec
from jaxllm.models.bert import BertConfig
from jaxllm.models.registry import pooling_model_config
from jaxllm.models.specs import bert_specs
from jaxllm.parallel.collectives import collective_bytes, count_collectives

#: KV heads that two and four devices divide, and that eight share in pairs; a vocabulary that none divides
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
DEVICES = (1, 2, 4, 8)
#: so few blocks that four requests do not fit at once
ARGUMENTS: dict[str, Any] = {**SMALL, "max_model_len": 128, "block_size": 8, "num_gpu_blocks_override": 24}
PROMPTS = ["one", "two and two", "a longer line that fills more than one block of the cache", "last"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.5, top_p=0.9, seed=7, max_tokens=40, ignore_eos=True)


def tokens(outputs: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def generate(llm: LLM, prompts: Any, params: SamplingParams) -> Any:
    return llm.generate(prompts, params, use_tqdm=False)


def answers(llm: LLM) -> dict[str, Any]:
    """What an engine makes of every kind of request."""
    found: dict[str, Any] = {"greedy": tokens(generate(llm, PROMPTS, GREEDY))}
    found["preemptions"] = next(
        metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter) and metric.name == "vllm:num_preemptions"
    )
    found["seeded"] = tokens(generate(llm, PROMPTS, SEEDED))
    again = generate(llm, PROMPTS[2], GREEDY)
    found["prefix hits"], found["after prefix hits"] = again[0].num_cached_tokens, tokens(again)
    scored = generate(llm, PROMPTS[2], dataclasses.replace(GREEDY, prompt_logprobs=0, logprobs=2, max_tokens=4))[0]
    found["prompt logprobs"] = [next(iter(entry.values())).logprob for entry in scored.prompt_logprobs[1:]]
    found["logprobs"] = [sorted(value.logprob for value in entry.values()) for entry in scored.outputs[0].logprobs]
    choice = StructuredOutputsParams(choice=["yes", "no", "perhaps"])
    found["structured"] = (
        generate(llm, PROMPTS[:2], dataclasses.replace(GREEDY, structured_outputs=choice))[0].outputs[0].text
    )
    return found


def exchanged(llm: LLM) -> dict[str, Any]:
    """What the largest step and its sampler exchange."""
    runner: Any = llm.engine.runner
    programs = runner.head.programs
    step, sampler = programs.forward(programs.largest), programs.sampler(1, True)[0]
    return {
        "count": [count_collectives(program.as_text()) for program in (step, sampler)],
        "bytes": [collective_bytes(program.as_text()) for program in (step, sampler)],
        "tokens": programs.largest.tokens,
    }


def explained(llm: LLM) -> dict[str, Any]:
    """What an engine says of itself, and the shapes of its arrays' parts by their names."""
    [params] = llm.apply_model(lambda params: params)
    parts: dict[str, list[Any]] = {}
    for path, array in jax.tree.leaves_with_path(params):
        name = ".".join(key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey))
        [shape] = {shard.data.shape for shard in array.addressable_shards}
        parts[name] = [shape, str(array.dtype)]
    said = llm.explain()
    return {"said": said.to_dict(), "text": str(said), "html": said._repr_html_(), "parts": parts}


def changed(llm: LLM, folder: Path) -> dict[str, Any]:
    """What becomes of an engine whose weights sleep, change, and are saved."""
    found: dict[str, Any] = {}
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        found[f"sleep {level}"] = tokens(generate(llm, PROMPTS, GREEDY))
    [params] = llm.apply_model(lambda params: params)
    llm.update_weights(jax.tree.map(lambda array: -array, params))
    found["other weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.update_weights(params)
    found["own weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.save(folder / "named")
    llm.update_weights(jax.tree.map(lambda array: -array, params))
    llm.update_weights(load_file(folder / "named" / "model.safetensors"))
    found["named weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    try:
        llm.update_weights(jax.tree.map(np.asarray, params))
    except JaxLLMError as error:
        found["refused"] = str(error)
    try:
        to_nnx(llm)
    except JaxLLMError as error:
        found["not trained"] = str(error)
    for form in ("safetensors", "orbax"):
        llm.save(folder / form, format=form)
    found["shards"] = sorted({shard.data.shape for shard in params.embedding.addressable_shards})
    found["world"] = llm.get_world_size()
    return found


def write_encoder(folder: Path) -> None:
    """A BERT with random weights, biases and norms included, under the names of a checkpoint."""
    config = {**CONFIG, "architectures": ["BertModel"], "num_attention_heads": 4, "max_position_embeddings": 128}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = pooling_model_config(config)
    assert isinstance(model, BertConfig)
    random = np.random.default_rng(3)
    tensors = {
        name: (random.standard_normal(part.shape) / 8).astype(np.float32)
        for spec in jax.tree.leaves(bert_specs(model), is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    save_file(tensors, folder / "model.safetensors")


def embeddings(folder: Path, devices: int) -> list[list[float]]:
    prompts = [{"prompt_token_ids": list(prompt.encode())} for prompt in PROMPTS]
    arguments = {**SMALL, "max_model_len": 64, "max_num_batched_tokens": 64, "skip_tokenizer_init": True}
    with LLM(folder, runner="pooling", convert="embed", tensor_parallel_size=devices, **arguments) as llm:
        return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]


#: of the models of the configurations for several GPUs: their heads, all else small
SHIPPED: dict[str, dict[str, Any]] = {
    "llama-3.3-70b-4xh100": {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 224,
        "vocab_size": 501,
    },
    "qwq-32b-2x80g": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 216,
        "vocab_size": 595,
    },
}
#: what a configuration's model would take minutes for on a CPU
FASTER = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32, "enforce_eager": True}


def shipped(folder: Path, name: str) -> list[int]:
    """Devices of a shipped configuration's engine, and how many tokens it makes; two layers with random weights."""
    folder.mkdir()
    config = {**CONFIG, "head_dim": 8, **SHIPPED[name]}
    (folder / "config.json").write_text(json.dumps(config))
    model, arguments = merged(name, {"model": folder})
    with LLM(model, **{**arguments, **FASTER, "load_format": "dummy", "skip_tokenizer_init": True}) as llm:
        [output] = generate(llm, [{"prompt_token_ids": [1, 2, 3]}], dataclasses.replace(GREEDY, detokenize=False))
        return [llm.get_world_size(), len(output.outputs[0].token_ids)]


def main() -> None:
    folder = Path(sys.argv[1])
    CONFIG.update(HEADS)
    (folder / "model").mkdir()
    write_tiny_model(folder / "model")
    found: dict[str, Any] = {}
    for devices in reversed(DEVICES):  # the first engine makes as many devices as the others need
        with LLM(folder / "model", tensor_parallel_size=devices, **ARGUMENTS) as llm:
            found[str(devices)] = {**answers(llm), "exchanged": exchanged(llm), "explained": explained(llm)}
            if devices == 8:
                (folder / "saved").mkdir()
                found["changed"] = changed(llm, folder / "saved")
    planned = jaxllm.explain(folder / "model", device="cpu", tensor_parallel_size=4, **ARGUMENTS)
    found["planned"] = planned.to_dict()
    for form, devices in (("safetensors", 1), ("orbax", 2)):
        with LLM(folder / "saved" / form, tensor_parallel_size=devices, **ARGUMENTS) as llm:
            found["changed"][f"saved as {form}"] = tokens(generate(llm, PROMPTS, GREEDY))
    found["shipped"] = {name: shipped(folder / name, name) for name in SHIPPED}
    write_encoder(folder / "encoder")
    found["embeddings"] = [embeddings(folder / "encoder", devices) for devices in (1, 4)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
