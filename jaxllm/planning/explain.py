"""An engine is explained from its configuration and its compiled programs, whether its devices are there or not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPU, GPUS
from jaxllm.layers.embedding import VOCAB
from jaxllm.layers.weight import Axis
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.parallel.collectives import Collective, collectives, expected_collectives
from jaxllm.parallel.mesh import DATA, STAGE
from jaxllm.parallel.rules import exchanging_layers, held, layer_sums
from jaxllm.planning.explanation import Explanation
from jaxllm.planning.layout import ArrayLayout, adapter_layouts, cache_layouts, weight_layouts
from jaxllm.planning.plan import Plan
from jaxllm.planning.step_estimate import COPY, StepEstimate, handed_on, step_estimate, step_exchanges
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
    config, memory, programs = engine.model_files.config, engine.memory_plan, runner.head.allocator
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
    return explanation(
        plan, dataclasses.replace(config, scheduler=limits), programs, replicas=engine.args.data_parallel_size
    )


def explanation(
    plan: Plan, config: RunnerConfig, programs: Programs | PipelinePrograms | None, *, replicas: int = 1
) -> Explanation:
    """Explain an engine that is planned.

    Args:
        config: what the plan is of, one replica.
        programs: of the engine, which compile what they lack; None: nothing can be compiled, and exchanges are those
            that the rules of the split make.
        replicas: of the model, on devices of their own.
    """
    limits, gpu = config.scheduler, _gpu(config)
    most = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    wanted: dict[tuple[int, int], str] = {}
    if config.pooler is None:
        wanted[1, 1] = "decode, one request"
        wanted.setdefault((most, most), "decode, all requests")
    wanted.setdefault((limits.max_num_batched_tokens, most), "largest step")
    parts = programs.stages if isinstance(programs, PipelinePrograms) else (programs,) * len(config.stages)
    layouts: list[ArrayLayout] = []
    steps: list[StepEstimate] = []
    for stage, own in zip(config.stages, parts, strict=True):
        weights = weight_layouts(stage)
        layouts += [*weights, *adapter_layouts(stage), *cache_layouts(stage, plan.memory.num_blocks)]
        steps += [_step(name, stage, own, weights, gpu, *size) for size, name in wanted.items()]
    largest = [step for step in steps if step.name == [*wanted.values()][-1]]
    if not any(step.not_compiled for step in largest):
        found = Counter[str]()
        for exchange in (exchange for step in largest for exchange in step.exchanges if exchange.kind != COPY):
            found[exchange.kind] += exchange.times
        plan = dataclasses.replace(plan, collectives=dict(found))
    sizes = {DATA: replicas, STAGE: len(config.stages)}
    return Explanation(
        plan=plan,
        mesh={**{axis: size for axis, size in sizes.items() if size > 1}, **config.target.mesh_sizes},
        gpu=None if gpu is None else gpu.name,
        layouts=tuple(layouts),
        steps=tuple(steps),
    )


def _gpu(config: RunnerConfig) -> GPU | None:
    """What the devices are; None: none that is known."""
    return next((gpu for gpu in GPUS.values() if gpu.description == config.target.kind), None)


def _step(
    name: str,
    config: RunnerConfig,
    programs: Programs | None,
    weights: tuple[ArrayLayout, ...],
    gpu: GPU | None,
    tokens: int,
    requests: int,
) -> StepEstimate:
    """A step of one stage, or of the whole model."""
    found, problem = None, "there is nothing to compile with"
    if programs is not None:
        try:
            found = sum(map(collectives, programs.step_texts(tokens, requests)), Counter[Collective]())
        except jax.errors.JaxRuntimeError as error:
            problem = f"the compiler says {str(error).splitlines()[0]}"
    exchanges = step_exchanges(
        expected_exchanges(config, tokens, requests) if found is None else found,
        num_layers=config.model.num_layers,
        devices=config.target.replicas * config.target.num_devices,
        gpu=gpu,
    )
    if config.stage is not None and not config.stage.is_last:
        rows = tokens if programs is None else programs.bucket(tokens, requests).tokens
        exchanges += (handed_on(rows * config.model.hidden_size * jnp.dtype(config.dtype).itemsize, gpu),)
    size, flops = read_and_computed(config, weights, tokens, requests)
    return step_estimate(
        name,
        stage=None if config.stage is None else config.stage.index,
        tokens=tokens,
        requests=requests,
        exchanges=exchanges,
        not_compiled=problem if found is None else "",
        weight_bytes=size,
        flops=flops,
        copied_bytes=sum(layout.device_bytes for layout in weights if layout.on_host),
        gpu=gpu,
    )


def expected_exchanges(config: RunnerConfig, tokens: int, requests: int) -> Counter[Collective]:
    """What the rules of the split make a step exchange: sums of hidden states, and logits in float32."""
    model, sizes, devices = config.model, config.target.mesh_sizes, config.target.num_devices
    rows = SAMPLE_ROWS_GPU[-1]
    slices = 0 if config.pooler is not None else -(-requests // rows)
    stage = config.stage
    if stage is not None and not stage.is_last:
        slices = 0
    times = expected_collectives(model.num_layers, devices, layer_sums=layer_sums(model), slices=slices)
    if times and stage is not None and not stage.is_first:
        times["all-reduce"] -= 1  # the embedding's
    hidden = tokens * model.hidden_size * jnp.dtype(config.dtype).itemsize
    words = held(Axis(VOCAB, model.vocab_size), sizes).size * devices
    each = {"all-reduce": (hidden, ""), "all-gather": (min(requests, rows) * words * 4, VOCAB)}
    found = Counter({Collective(kind, each[kind][0], devices, each[kind][1]): number for kind, number in times.items()})
    replicas = config.target.replicas
    if exchanging := exchanging_layers(model, replicas):
        found += Counter(
            {
                Collective("all-gather", replicas * hidden, replicas, "tokens"): exchanging,
                Collective("all-gather", replicas * tokens, replicas, "tokens"): 1,
                Collective("reduce-scatter", hidden, replicas, "tokens"): exchanging,
            }
        )
    return found


def read_and_computed(
    config: RunnerConfig, weights: tuple[ArrayLayout, ...], tokens: int, requests: int
) -> tuple[int, int]:
    """(bytes of weights that a device reads in a step, operations of its products with them).

    Of a table of vectors a step reads a few rows, unless it is the head, too; the head computes logits of one token a
    request. Of experts a step reads those that its tokens go to: with as many tokens as are told, which choose evenly
    and each for itself, a share of ``1 - (1 - top_k / experts) ** tokens``. The tokens of all replicas that step
    together, as many of each, go to them.
    """
    names = {layout.name.partition(".")[0] for layout in weights}
    moe = config.model.moe if isinstance(config.model, DecoderConfig) else None
    size = flops = 0.0
    for layout in weights:
        # one that is quantized is the matrix's name and the array's
        first, *others = layout.name.split(".")
        is_table = any(name.endswith("embedding") for name in (first, *others))
        if is_table and (config.stage is not None or "head" in names or first != "embedding"):
            continue
        chosen = 1.0 if layout.experts is None or moe is None else moe.top_k / layout.experts
        own = tokens if layout.experts is None else tokens * config.target.replicas
        size += layout.device_bytes * (1 - (1 - chosen) ** own)
        stacked = (layout.axes[0][0][0] == "layers") + (layout.experts is not None)
        if len(layout.axes) > 1 + stacked:
            rows = requests if VOCAB in {name for name, _ in layout.axes[0]} else own
            flops += 2 * layout.count * math.prod(layout.device_shape) * rows * chosen
    return round(size), round(flops)
