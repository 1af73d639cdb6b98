"""An engine on a GPU that is not there: its settings from the memory plan, its step times from the roofline."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import gpu_named
from jaxllm.config.engine_args import engine_args
from jaxllm.config.links import HOST_BANDWIDTH
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.planning.api import config_path, plan
from jaxllm.planning.estimate import estimated_activations
from jaxllm.planning.explain import expected_exchanges, read_and_computed
from jaxllm.planning.layout import weight_layouts
from jaxllm.planning.step_estimate import step_exchanges
from jaxllm.runner.compile.target import target_described
from jaxllm.runner.memory.fit import plan_memory
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.startup.engine_settings import engine_settings
from jaxllm.startup.setup import read_setup
from jaxllm.tuning.simulation.roofline_steps import RooflineSteps


def absent_engine(
    model: str | os.PathLike[str], /, *, device: str, exact: bool = False, **arguments: Any
) -> tuple[EngineSettings, RooflineSteps]:
    """What the simulator has to know of an engine on a GPU that need not be there.

    Args:
        model: as `jaxllm.plan` takes it: a config.json is enough.
        device: a GPU's name (`jaxllm.config.devices`).
        exact: have JAX's CUDA compiler plan the memory, where there is one, for a minute; else it is an estimate from
            shapes. Step times are the roofline's either way.
        **arguments: the engine's.

    Raises:
        ValidationError: the arguments contradict each other or the model, or the model does not fit.
    """
    gpu, args = gpu_named(device), engine_args(model, **arguments)
    if args.pipeline_parallel_size > 1 or args.data_parallel_size > 1:
        raise ValidationError(
            "a simulation is of one replica without a pipeline: leave pipeline_parallel_size and data_parallel_size "
            "out, and give one replica's share of the requests."
        )
    with config_path(args) as path:
        target = target_described(gpu, grid=args.grid).replica(0)
        config = read_setup(args, path).runner_config(target, progress=None)
        config, memory = plan_memory(config, estimated_activations)
        if exact:
            planned = plan(model, device=device, **arguments)
            if not planned.fits:
                raise ValidationError(planned.problem)
            memory = planned.memory
        limits = dataclasses.replace(config.scheduler, max_model_len=memory.max_model_len)
        settings = engine_settings(args, config, limits, memory, num_devices=args.grid.size)
        return settings, _steps(config, device, basis="" if exact else "The memory plan is an estimate from shapes.")


def _steps(config: RunnerConfig, device: str, *, basis: str) -> RooflineSteps:
    gpu, model, devices = gpu_named(device), config.step_model, config.target.num_devices
    if config.pooler is not None or not isinstance(model, DecoderConfig):
        raise ValidationError("a simulation is of a model that generates.")
    weights = weight_layouts(config)
    copied = sum(layout.device_bytes for layout in weights if layout.on_host) / HOST_BANDWIDTH[gpu.name]

    @functools.cache
    def work(tokens: int, requests: int) -> tuple[float, float, float, float]:
        size, flops = read_and_computed(config, weights, tokens, requests)
        exchanges = step_exchanges(
            expected_exchanges(config, tokens, requests), num_layers=model.num_layers, devices=devices, gpu=gpu
        )
        return size, flops, sum(exchange.seconds or 0.0 for exchange in exchanges), copied

    width = model.head_dim if model.latents is None else model.latents.width
    heads = -(-model.num_heads // devices)
    rate = gpu.bf16_flops if jnp.dtype(config.dtype).itemsize == 2 else gpu.bf16_flops / 16
    return RooflineSteps(
        device=f"{devices} {gpu.description}" if devices > 1 else gpu.description,
        memory_bandwidth=gpu.memory_bandwidth,
        flops=rate,
        work=work,
        kv_bytes=config.kv_bytes_per_token,
        # a product with the keys and one with the values, two operations for each number
        pair_flops=4.0 * heads * width * model.num_layers,
        basis=basis,
    )
