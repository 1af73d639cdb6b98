"""The kernels that multiply with quantized weights on a CPU, loaded before programs that call them are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.runner.runner_config import RunnerConfig
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.packed_matmul import cpu_ffi
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, ScaledWeight

_WEIGHTS = (ScaledWeight, Int4Weight, BlockWeight, CodebookWeight)


def with_cpu_kernels(config: RunnerConfig, folder: Path) -> RunnerConfig:
    """A runner's configuration with the kernels that its weights have on this device.

    Where bits must not depend on the batch there are none: matrices of many rows are multiplied by XLA, which adds up
    in another order.

    Args:
        folder: where their machine code is kept.
    """
    if config.platform != "cpu" or config.quantization is None or config.backend.deterministic:
        return config
    leaves = jax.tree.leaves(config.params(), is_leaf=lambda leaf: isinstance(leaf, _WEIGHTS))
    # experts, which have an axis more, are multiplied group by group
    weights = [leaf for leaf in leaves if isinstance(leaf, _WEIGHTS) and len(leaf.shape) <= 3]
    version = cpu_ffi.load(weights, jnp.dtype(config.dtype), folder)
    if not version:
        return config
    return dataclasses.replace(config, attention=dataclasses.replace(config.backend, cpu_kernels=version))
