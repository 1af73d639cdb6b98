"""Replicas of a model that is split over devices, in a process that has JAX, and four virtual devices, to itself.

``python -m support.data_parallel FOLDER`` prints one JSON object: what engines of two replicas of two devices answered.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from support.tensor_parallel import ARGUMENTS, GREEDY, PROMPTS, SEEDED, answers, generate, tokens
from support.tiny_model import write_tiny_model

from jaxllm import LLM
from jaxllm.api.metric import Histogram

SHORT = dataclasses.replace(GREEDY, max_tokens=8)


def found_with(llm: LLM) -> dict[str, Any]:
    return {**answers(llm), "many": tokens(generate(llm, PROMPTS * 3, SHORT))}


def main() -> None:
    folder = Path(sys.argv[1])
    model = folder / "model"
    model.mkdir()
    write_tiny_model(model)
    found: dict[str, Any] = {}
    with LLM(model, data_parallel_size=2, tensor_parallel_size=2, **ARGUMENTS) as llm:
        found["replicas"] = found_with(llm)
        found["world"] = [llm.get_world_size(), llm.get_world_size(include_dp=False)]
        found["devices"] = [
            sorted(device.id for device in params.embedding.sharding.device_set)
            for params in llm.apply_model(lambda params: params)
        ]
        llm.sleep(2)
        llm.wake_up()
        found["sleep"] = tokens(generate(llm, PROMPTS * 3, SHORT))
        own = llm.apply_model(lambda params: params)
        llm.update_weights(jax.tree.map(lambda array: -array, own[0]))
        found["other weights"] = tokens(generate(llm, [PROMPTS[0]] * 4, SHORT))
        llm.update_weights(own[0])
        found["own weights"] = tokens(generate(llm, PROMPTS * 3, SHORT))
        found["pages"] = [core.scheduler.kv_cache_manager.pool.num_used for core in llm.engine.core.cores]
        found["steps"] = [
            metric.count
            for metric in llm.get_metrics()
            if isinstance(metric, Histogram) and metric.name == "vllm:iteration_tokens_total"
        ]
    with LLM(model, data_parallel_size=2, pipeline_parallel_size=2, **ARGUMENTS) as llm:
        found["stages"] = {"many": tokens(generate(llm, PROMPTS * 3, SHORT))}
        found["stages"]["seeded"] = tokens(generate(llm, PROMPTS, SEEDED))
        llm.sleep(2)
        llm.wake_up()
        found["stages"]["greedy"] = tokens(generate(llm, PROMPTS, GREEDY))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
