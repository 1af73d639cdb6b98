"""An engine is explained from its configuration and its compiled programs, whether its devices are there or not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPUS
from jaxllm.layers.embedding import VOCAB
from jaxllm.layers.weight import Axis
from jaxllm.parallel.collectives import Collective, collectives, expected_collectives
from jaxllm.parallel.rules import held, layer_sums
from jaxllm.planning.explanation import Explanation
from jaxllm.planning.layout import ArrayLayout, cache_layout, weight_layouts
from jaxllm.planning.plan import Plan
from jaxllm.planning.step_estimate import StepEstimate, step_estimate, step_exchanges
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.heads.pipeline_programs import PipelinePrograms
from jaxllm.runner.heads.sampling_programs import SAMPLE_ROWS_GPU
from jaxllm.runner.runner_config import RunnerConfig

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine


def explain_engine(engine: Engine) -> Explanation:
    """Explain an engine that runs, by the programs that it runs.

    Raises:
        ValidationError: it has no model.
        RuntimeError: it has been shut down.
    """
    _ = engine.core  # which is no more where it has been shut down
    if engine.args.load_format == "null":
        raise ValidationError('load_format="null" has no model, so there is nothing to explain.')
    runner: Any = engine.runner
    config, memory, programs = engine.model_files.config, engine.memory_plan, runner.head.programs
    limits = dataclasses.replace(config.scheduler, max_model_len=memory.max_model_len)
    plan = Plan(
        model=str(engine.args.model),
        device=config.platform,
        memory=memory,
        fits=True,
        problem="",
        remedies=(),
        collectives={},
        exact=True,
        basis="These are the programs that the engine runs.",
    )
    return explanation(plan, dataclasses.replace(config, scheduler=limits), programs)


def explanation(plan: Plan, config: RunnerConfig, programs: Programs | PipelinePrograms | None) -> Explanation:
    """Explain an engine that is planned.

    Args:
        config: what the plan is of.
        programs: of the engine, which compile what they lack; None: nothing can be compiled, and exchanges are those
            that the rules of the split make.

    Raises:
        ValidationError: the model is cut into stages.
    """
    if config.pipeline or isinstance(programs, PipelinePrograms):
        raise ValidationError(
            f"pipeline_parallel_size={len(config.pipeline)} cannot be explained yet; `jaxllm plan` says what a stage "
            "needs. What works: pipeline_parallel_size=1."
        )
    sizes, limits = dict(config.target.mesh_sizes), config.scheduler
    gpu = next((gpu for gpu in GPUS.values() if gpu.description == config.target.kind), None)
    weights = weight_layouts(config)
    most = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    wanted: dict[tuple[int, int], str] = {}
    if config.pooler is None:
        wanted[1, 1] = "decode, one request"
        wanted.setdefault((most, most), "decode, all requests")
    wanted.setdefault((limits.max_num_batched_tokens, most), "largest step")

    def step(name: str, tokens: int, requests: int) -> StepEstimate:
        problem = "there is nothing to compile with"
        if programs is not None:
            try:
                texts, problem = programs.step_texts(tokens, requests), ""
            except jax.errors.JaxRuntimeError as error:
                problem = f"the compiler says {str(error).splitlines()[0]}"
        if problem:
            found = _expected(config, tokens, requests)
        else:
            found = sum(map(collectives, texts), Counter[Collective]())
        devices = config.target.num_devices
        exchanges = step_exchanges(found, num_layers=config.model.num_layers, devices=devices, gpu=gpu)
        size, flops = _read_and_computed(weights, tokens, requests)
        return step_estimate(
            name,
            tokens=tokens,
            requests=requests,
            exchanges=exchanges,
            not_compiled=problem,
            weight_bytes=size,
            flops=flops,
            gpu=gpu,
        )

    steps = tuple(step(name, *size) for size, name in wanted.items())
    if not steps[-1].not_compiled:
        found = Counter[str]()
        for exchange in steps[-1].exchanges:
            found[exchange.kind] += exchange.times
        plan = dataclasses.replace(plan, collectives=dict(found))
    return Explanation(
        plan=plan,
        mesh=sizes,
        gpu=None if gpu is None else gpu.name,
        layouts=(*weights, cache_layout(config, plan.memory.num_blocks)),
        steps=steps,
    )


def _expected(config: RunnerConfig, tokens: int, requests: int) -> Counter[Collective]:
    """What the rules of the split make a step exchange: sums of hidden states, and logits in float32."""
    model, sizes, devices = config.model, config.target.mesh_sizes, config.target.num_devices
    rows = SAMPLE_ROWS_GPU[-1]
    blocks = 0 if config.pooler is not None else -(-requests // rows)
    times = expected_collectives(model.num_layers, devices, layer_sums=layer_sums(model), blocks=blocks)
    hidden = tokens * model.hidden_size * jnp.dtype(config.dtype).itemsize
    words = held(Axis(VOCAB, model.vocab_size), sizes).size * devices
    each = {"all-reduce": (hidden, ""), "all-gather": (min(requests, rows) * words * 4, VOCAB)}
    return Counter({Collective(kind, each[kind][0], devices, each[kind][1]): number for kind, number in times.items()})


def _read_and_computed(weights: tuple[ArrayLayout, ...], tokens: int, requests: int) -> tuple[int, int]:
    """(bytes of weights that a device reads in a step, operations of its products with them).

    Of a table of vectors a step reads a few rows, unless it is the head, too; the head computes logits of one token a
    request.
    """
    names = {layout.name for layout in weights}
    size = flops = 0
    for layout in weights:
        field = layout.name.rpartition(".")[2]
        if field.endswith("embedding") and ("head" in names or "." in layout.name):
            continue
        size += layout.device_bytes
        if len(layout.axes) > 1 + ("layers" == layout.axes[0][0][0]):
            numbers = layout.count
            for length in layout.device_shape:
                numbers *= length
            flops += 2 * numbers * (requests if VOCAB in {name for name, _ in layout.axes[0]} else tokens)
    return size, flops
