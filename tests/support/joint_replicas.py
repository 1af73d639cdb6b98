"""Replicas that have a model's experts between them, on four virtual devices, in a process that has JAX to itself.

``python -m support.joint_replicas FOLDER`` prints one JSON object: what two replicas of two devices, and one device,
made of the same requests.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e2e.test_compiles import counted_events
from safetensors.numpy import load_file
from support.data_parallel import SHORT, found_with
from support.expert_parallel import write_model
from support.tensor_parallel import ARGUMENTS, GREEDY, PROMPTS, SEEDED, exchanged, generate, tokens
from support.ways import counted

from jaxllm import LLM
from jaxllm.layers.context import Context
from jaxllm.layers.moe import Experts, MoEConfig, SparseMLP, sparse_mlp
from jaxllm.layers.token_exchange import of_all_copies
from jaxllm.parallel.collectives import collective_bytes
from jaxllm.parallel.mesh import DATA, make_mesh, on_each_device
from jaxllm.parallel.rules import split_axes

TOGETHER = {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True}
MANY = PROMPTS * 3


def everything(llm: LLM) -> dict[str, Any]:
    several = dataclasses.replace(SEEDED, n=3)
    penalised = dataclasses.replace(SEEDED, repetition_penalty=1.3, logprobs=1)
    # of two requests of different lengths the other replica goes on alone
    uneven = [dataclasses.replace(GREEDY, max_tokens=length) for length in (3, 30)]
    return {
        "load": counted(llm),
        **found_with(llm),
        "several": [[list(c.token_ids) for c in output.outputs] for output in generate(llm, PROMPTS, several)],
        "penalised, after prefix hits": tokens(generate(llm, PROMPTS, penalised)),
        "one request": tokens(generate(llm, PROMPTS[:1], SEEDED)),
        "uneven": tokens(llm.generate(PROMPTS[:2], uneven, use_tqdm=False)),
    }


def failing(what: Callable[..., Any], error: BaseException, after: int) -> Callable[..., Any]:
    """`what`, which fails once, after so many calls."""
    calls = iter(range(10**6))

    def fails(*args: Any) -> Any:
        if next(calls) == after:
            raise error
        return what(*args)

    return fails


def broken(llm: LLM) -> dict[str, Any]:
    """What becomes of requests where something fails in their midst, and of those after them."""
    found: dict[str, Any] = {}
    joint: Any = llm.engine.runner
    core: Any = llm.engine.core.cores[1]
    for name, where, attribute in (("device", joint.head, "launch"), ("host", core.scheduler, "update")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, attribute, failing(getattr(where, attribute), RuntimeError("broken"), 3))
            with pytest.raises(RuntimeError, match="broken"):
                generate(llm, MANY, GREEDY)
        found[name] = llm.engine.core.has_unfinished
        found[f"after {name}"] = tokens(generate(llm, MANY, SHORT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint.head, "launch", failing(joint.head.launch, KeyboardInterrupt(), 3))
        with pytest.raises(KeyboardInterrupt):
            generate(llm, MANY, GREEDY)
    found["interrupt"] = llm.engine.core.has_unfinished
    found["after interrupt"] = tokens(generate(llm, MANY, SHORT))
    first = next(iter(llm.as_completed(iter(MANY), GREEDY)))
    assert first.finished
    found["abandoned"] = llm.engine.core.has_unfinished
    found["after abandoned"] = tokens(generate(llm, MANY, SHORT))
    return found


def changed(llm: LLM, model: Path, saved: Path) -> dict[str, Any]:
    """What becomes of an engine whose weights sleep, change, and are saved."""
    found: dict[str, Any] = {}
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        found[f"sleep {level}"] = tokens(generate(llm, MANY, SHORT))
    [own] = llm.apply_model(lambda params: params)
    llm.update_weights(jax.tree.map(lambda array: -array, own))
    found["other weights"] = tokens(generate(llm, [PROMPTS[0]] * 4, SHORT))
    llm.update_weights(own)
    found["own weights"] = tokens(generate(llm, MANY, SHORT))
    llm.save(saved)
    np.testing.assert_equal(load_file(saved / "model.safetensors"), load_file(model / "model.safetensors"))
    return found


def sent() -> dict[str, Any]:
    """A layer with experts of four copies on one device each, whose many tokens go to one expert each: what they
    exchange, and how far they are from one device, where the choice is even and where it is not.
    """
    tokens, size, config = 256, 16, MoEConfig(num_experts=8, top_k=1, intermediate_size=8, expert_parallel=True)
    mesh, random = make_mesh(np.array(jax.devices()).reshape(4, 1)), np.random.default_rng(0)

    def layer(context: Context, x: jax.Array, valid: jax.Array, router: Any, gate_up: Any, down: Any) -> jax.Array:
        experts = Experts(gate_up=gate_up, gate_up_bias=None, down=down, down_bias=None)
        weights = SparseMLP(router, None, None, experts, None, None, None)
        return sparse_mlp(context, config, "silu", weights, x, of_all_copies(context, valid))[0]

    x, valid = random.normal(size=(4 * tokens, size)), random.random(4 * tokens) < 0.9
    router, gate_up, down = (random.normal(size=shape) for shape in ((8, size), (8, 16, size), (8, size, 8)))
    one_expert = np.where(np.arange(8)[:, None] == 5, 100.0, 0) * np.sign(x[0])
    split = [jax.NamedSharding(mesh, jax.P(DATA) if i != 2 else jax.P()) for i in range(5)]
    errors, program = [], None
    for route in (router, one_expert):
        arrays = [jnp.asarray(a, jnp.float32 if a.dtype != bool else bool) for a in (x, valid, route, gate_up, down)]
        given = [jax.device_put(a, where) for a, where in zip(arrays, split, strict=True)]
        if program is None:
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in given]
            function = functools.partial(layer, Context(split=split_axes(mesh.shape)))
            program = jax.jit(on_each_device(function, mesh, shapes, jax.P(DATA))).lower(*given).compile()
        wanted = np.where(valid[:, None], jax.jit(functools.partial(layer, Context()))(*arrays), 0)
        errors.append(float(np.abs(np.asarray(program(*given)) - wanted).max()))
    text = (program.as_text() if program is not None else None) or ""
    found = [line for line in text.splitlines() if re.search(r" all-to-all\(", line)]
    shapes = [re.findall(r"[fs]32\[([\d,]+)\]", line.split(" all-to-all(")[0]) for line in found]
    exchanged = [sum(4 * math.prod(map(int, shape.split(","))) for shape in each) for each in shapes]
    return {"errors": errors, "sent": sorted(exchanged), "gathered": collective_bytes(text), "tokens": tokens}


def main() -> None:
    folder = Path(sys.argv[1])
    model = folder / "model"
    write_model(model)
    found: dict[str, Any] = {}
    with LLM(model, record_expert_load=True, **TOGETHER, **ARGUMENTS) as llm:
        runner: Any = llm.engine.runner

        def places() -> list[int]:
            return [shard.data.unsafe_buffer_pointer() for shard in runner._state.cache.addressable_shards]

        before = places()
        with counted_events() as counts:
            found["together"] = everything(llm)
        found["compiled"], found["cache stays"] = dict(counts), places() == before
        found["exchanged"] = exchanged(llm)
        found["explained"] = llm.explain().plan.collectives
        [params] = llm.apply_model(lambda params: params)
        experts = params.layers[0].sparse.experts.gate_up
        found["experts"] = sorted({shard.data.shape for shard in experts.addressable_shards})
        parts = [array.addressable_data(0).nbytes for array in jax.tree.leaves(params)]
        found["weights"] = [sum(parts), llm.memory_plan.weight_bytes]
        found["world"] = [llm.get_world_size(), llm.get_world_size(include_dp=False)]
        for name in ("generation_tokens", "num_preemptions", "prefix_cache_hits"):
            metrics = [metric for metric in llm.get_metrics() if metric.name == f"vllm:{name}"]
            found[name] = {metric.labels["engine"]: getattr(metric, "value", 0) for metric in metrics}
        found["broken"] = broken(llm)
        found["changed"] = changed(llm, model, folder / "saved")
        core: Any = llm.engine.core
        found["pages"] = [core.scheduler.kv_cache_manager.pool.num_used for core in core.cores]
        found["left"] = [len(core._of), *(replica.load for replica in core._replicas)]
    with LLM(model, record_expert_load=True, **ARGUMENTS) as llm:
        found["one"] = everything(llm)
    found["sent"] = sent()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
