"""Engines whose model is cut into stages on virtual devices, in a process that has JAX to itself.

``python -m support.pipeline_parallel FOLDER`` prints one JSON object: by engine, what it answered.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from safetensors.numpy import load_file
from support.offloading import asked_again
from support.pairs import PLAIN, add_bonus, generated
from support.tensor_parallel import ARGUMENTS, GREEDY, HEADS, PROMPTS, SEEDED, answers, generate, tokens
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm import LLM, LogitsProcessor
from jaxllm.flax import to_nnx
from jaxllm.models.segments import segment_sizes
from jaxllm.runner.heads.pipeline import PipelineHead

LAYERS = 5
#: what every engine of the same model is started with
COMMON: dict[str, Any] = {**ARGUMENTS, "max_num_batched_tokens": 8, "reasoning_config": PLAIN["reasoning_config"]}
#: settings of `support.pairs` that stages work with; several decode steps in one launch are refused
SETTINGS: dict[str, Any] = {
    "scheduling_policy": "priority",
    "max_num_active_seqs": 3,
    "deterministic": True,
    "kv_offloading_size": "1MB",
    "cpu_offload_gb": "1MB",
}
#: name -> how the model is spread, and what else is set; the first engine makes as many devices as the others need
ENGINES: dict[str, dict[str, Any]] = {
    "4": {"pipeline_parallel_size": 4, **SETTINGS},
    "2 x 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "kv_offloading_size": "1MB"},
    "one": {},
}
#: Gemma 3's local and global layers, whose embedding is the head: groups of which a stage has one, or parts of both
HYBRID: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}


def more_answers(llm: LLM) -> dict[str, Any]:
    """Besides `answers`: several outputs of a prompt, and penalties, which look at what was generated."""
    several = generate(llm, PROMPTS[:3], dataclasses.replace(SEEDED, n=3, max_tokens=12))
    penalized = dataclasses.replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5)
    return {
        "several": [[list(completion.token_ids) for completion in output.outputs] for output in several],
        "penalties": tokens(generate(llm, PROMPTS, penalized)),
        "penalties after prefix hits": tokens(generate(llm, PROMPTS[2], penalized)),
    }


def laws(llm: LLM) -> dict[str, Any]:
    """Of each stage: its layers, the bytes of its state that its largest step does not write in place, and its device;
    and the blocks that are in use when nobody is there.
    """
    runner: Any = llm.engine.runner
    pool = llm.engine.core.cores[0].scheduler.kv_cache_manager.pool
    assert isinstance(runner.head, PipelineHead)
    copied, devices = [], []
    for programs, state in zip(runner.head.allocator.stages, runner._state.stages, strict=True):
        memory: Any = programs.forward(programs.largest).memory_analysis()
        split = 1 if programs._mesh is None else programs._mesh.size
        tokens = 0 if state.tokens is None else state.tokens.nbytes
        copied.append(state.cache.nbytes // split + tokens - memory.alias_size_in_bytes)
        devices.append(sorted(device.id for device in state.cache.devices()))
    return {
        "layers": [sum(segment_sizes(programs._params)) for programs in runner.head.allocator.stages],
        "copied": copied,
        "devices": devices,
        "blocks": pool.num_used,
        "plan": [llm.memory_plan.pipeline_parallel_size, llm.get_world_size()],
    }


def traced(llm: LLM, folder: Path) -> dict[str, Any]:
    """What a trace tells of stages."""
    with llm.trace() as trace:
        generate(llm, PROMPTS, GREEDY)
    trace.save_chrome_trace(folder / "trace.json")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return {
        "steps": [step.step for step in trace.steps],
        "stages": [dataclasses.asdict(record) for record in trace.stages],
        "bubble": trace.bubble,
        "text": repr(trace),
        "drawn": sorted({event["args"]["name"] for event in events if event["name"] == "thread_name"}),
    }


def changed(llm: LLM, folder: Path) -> dict[str, Any]:
    """What becomes of an engine whose weights sleep, change, and are saved."""
    found: dict[str, Any] = {}
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        found[f"sleep {level}"] = tokens(generate(llm, PROMPTS, GREEDY))
    [params] = llm.apply_model(lambda params: params)
    llm.update_weights(jax.tree.map(lambda array: -np.asarray(array), params))
    found["other weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.update_weights(params)
    found["own weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.save(folder.with_name("named"))
    llm.update_weights(jax.tree.map(lambda array: -np.asarray(array), params))
    llm.update_weights(load_file(folder.with_name("named") / "model.safetensors"))
    found["named weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.update_weights(to_nnx(llm))
    found["trained weights"] = tokens(generate(llm, PROMPTS, GREEDY))
    llm.save(folder, format="orbax")
    return found


def hybrid(folder: Path) -> dict[str, Any]:
    """A model with sliding windows and one matrix for embedding and head: drawn in stages, saved, and read whole."""
    arguments = {**ARGUMENTS, "skip_tokenizer_init": True, "num_gpu_blocks_override": 60}
    prompts = [{"prompt_token_ids": list(prompt.encode())} for prompt in PROMPTS]
    params = dataclasses.replace(GREEDY, detokenize=False, prompt_logprobs=0)
    (folder / "drawn").mkdir()
    (folder / "drawn" / "config.json").write_text(json.dumps({**CONFIG, **HYBRID}))
    stages = {"pipeline_parallel_size": 2, "pipeline_layer_partition": "1,2"}

    def told(llm: LLM) -> list[Any]:
        outputs = generate(llm, prompts, params)
        likely = [[next(iter(entry.values())).logprob for entry in o.prompt_logprobs[1:]] for o in outputs]
        return [tokens(outputs), sum(likely, [])]

    with LLM(folder / "drawn", load_format="dummy", **stages, **arguments) as llm:
        [drawn] = llm.apply_model(lambda params: params)
        llm.update_weights(jax.tree.map(lambda array: array * 16, drawn))
        llm.save(folder / "saved")
        cut = told(llm)
    with LLM(folder / "saved", **arguments) as llm:
        return {"cut": cut, "one": told(llm)}


def main() -> None:
    folder = Path(sys.argv[1])
    CONFIG.update(HEADS, num_hidden_layers=LAYERS)
    (folder / "model").mkdir()
    write_tiny_model(folder / "model")
    found: dict[str, Any] = {}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    processors = [LogitsProcessor(add_bonus, extra_args={"bonus": 0.0})]
    for name, spread in ENGINES.items():
        with LLM(folder / "model", **spread, **COMMON, logits_processors=processors) as llm:
            before = len(compiled)
            found[name] = answers(llm) | more_answers(llm)
            if name != "2 x 2":
                found[name]["asked"] = generated(llm)
            found[name]["offloaded"] = asked_again(llm)
            found[name]["compiled"] = [event for event in compiled[before:] if "compil" in event]
            if name != "one":
                found[name]["laws"] = laws(llm)
                found[name]["explained"] = llm.explain().to_dict()
            if name == "4":
                found[name]["trace"] = traced(llm, folder)
                found["changed"] = changed(llm, folder / "saved")
    with LLM(folder / "saved", **COMMON, logits_processors=processors) as llm:
        found["changed"]["saved"] = tokens(generate(llm, PROMPTS, GREEDY))
    (folder / "hybrid").mkdir()
    found["hybrid"] = hybrid(folder / "hybrid")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
