"""The kernels of an engine on a CPU, loaded before programs that call them are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layers.activation import ONE_PASS
from jaxllm.layers.moe import Experts, SparseMLP
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.speculative.drafter import ReadingDrafter
from pallas_kernels.backend import Backend
from pallas_kernels.cpu_ffi.compiled import later
from pallas_kernels.cpu_ffi.untouched import load as load_untouched
from pallas_kernels.dense_matmul.cpu_ffi import load as load_dense
from pallas_kernels.gguf_blocks import BlockWeight
from pallas_kernels.lora_matmul.cpu_ffi import Form
from pallas_kernels.lora_matmul.cpu_ffi import load as load_adapters
from pallas_kernels.packed_matmul import cpu_ffi
from pallas_kernels.paged_attention.cpu_ffi import form_of, latent_form_of
from pallas_kernels.paged_attention.cpu_ffi import load as load_attention
from pallas_kernels.quant_matmul import cpu_ffi as int8
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, RoundedInputs, ScaledWeight

_WEIGHTS = (ScaledWeight, Int4Weight, BlockWeight, CodebookWeight)


def with_cpu_kernels(config: RunnerConfig, folder: Path) -> RunnerConfig:
    """A runner's configuration with the kernels that its attention, weights and adapters have on this device. They are
    compiled, or loaded, later: by whoever makes its programs, or calls `cpu_ffi.compiled.finish` beside that.

    Where bits must not depend on the batch there are none but those of dense products and of int8 numbers by int8
    numbers: attention of prompts with pictures, and packed matrices of many rows, are left to XLA in any engine, which
    adds up in another order.

    Args:
        folder: where their machine code is kept.
    """
    if config.platform != "cpu" or config.backend.implementation != "xla":
        return config
    with later():
        # of all the least code, which is there at once
        backend = dataclasses.replace(config.backend, cpu_untouched=load_untouched(folder))
        backend = dataclasses.replace(backend, cpu_dense=_dense(config, folder))
        if config.quantization is not None:
            backend = dataclasses.replace(backend, cpu_int8=_of_rounded_inputs(config, folder))
        if not backend.deterministic:
            backend = dataclasses.replace(backend, cpu_attention=_attention(config, folder))
            if config.lora is not None:
                adapters = Form(rank=config.lora.max_lora_rank, dtype=config.lora.dtype)
                backend = dataclasses.replace(backend, cpu_adapters=load_adapters(adapters, folder))
            if config.quantization is not None:
                backend = dataclasses.replace(backend, cpu_kernels=_of_weights(config, backend, folder))
            backend = dataclasses.replace(backend, cpu_grouped=_of_experts(config, folder))
    return dataclasses.replace(config, attention=backend)


def _dense(config: RunnerConfig, folder: Path) -> tuple[str, ...]:
    """Load the kernel of dense products, and the one that ends with the model's activation. Products with adapters
    have none: where bits may depend on no other request, neither have those beside them.
    """
    activations, model, same_bits = {""}, config.step_model, config.backend.deterministic
    if isinstance(model, DecoderConfig) and model.gated_mlp and config.quantization is None:
        if not (same_bits and config.lora is not None):
            activations.add(ONE_PASS.get(model.activation, ""))
    found = {load_dense(config.dtype, folder, activation=name) for name in activations}
    return tuple(sorted(found - {""}))


def _attention(config: RunnerConfig, folder: Path) -> tuple[str, ...]:
    """Load the kernels of attention, of the model's pages and of those of a model that drafts."""
    found: set[str] = set()
    drafter = config.step_drafter
    for model in (config.step_model, drafter.model if isinstance(drafter, ReadingDrafter) else None):
        if not isinstance(model, DecoderConfig):
            continue
        pages: dict[str, Any] = dict(block_size=config.block_size, stored=config.kv_dtype)
        if model.latents is not None:
            latents = model.latents
            form = latent_form_of(heads=model.num_heads, width=latents.width, value_width=latents.rank, **pages)
        else:
            form = form_of(
                heads=model.num_heads,
                kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                transposed=config.backend.transposes_keys(config.block_size),
                has_softcap=model.attention_softcap is not None,
                dtype=config.dtype,
                **pages,
            )
        if form is not None:
            found.add(load_attention(form, folder))
    return tuple(sorted(found - {""}))


def _of_rounded_inputs(config: RunnerConfig, folder: Path) -> tuple[str, ...]:
    """Load the kernels of weights whose inputs are rounded to int8."""
    return int8.load(_parts(config, RoundedInputs), jnp.dtype(config.dtype).name, folder)


def _of_weights(config: RunnerConfig, backend: Backend, folder: Path) -> str:
    """Load the kernels of the model's quantized weights, but for those that inputs of int8 numbers have; their
    version.
    """
    params: Any = config.params()
    if config.target.mesh is None:  # parts of a matrix may have no kernel where the whole has

        def left(weight: Any) -> Any:
            is_taken = isinstance(weight, RoundedInputs) and int8.kernel_for(backend.cpu_int8, weight) is not None
            return None if is_taken else weight

        params = jax.tree.map(left, params, is_leaf=lambda leaf: isinstance(leaf, RoundedInputs))
    # experts, which have an axis more, are multiplied group by group
    weights = [weight for weight in _quantized(params) if len(weight.shape) <= 3]
    version = cpu_ffi.load(weights, jnp.dtype(config.dtype), folder)
    model = config.step_model
    if isinstance(model, DecoderConfig) and model.moe is not None and model.moe.float32_router:
        # routers, whose inputs are float32, too
        routers = [part.router for part in _parts(config, SparseMLP)]
        cpu_ffi.load(_quantized(routers), jnp.dtype(jnp.float32), folder)
    return version


def _of_experts(config: RunnerConfig, folder: Path) -> str:
    """Load the kernels of the model's experts, quantized or not; their version."""
    matrices = [(part.gate_up, part.down) for part in _parts(config, Experts)]
    leaves = jax.tree.leaves(matrices, is_leaf=lambda leaf: isinstance(leaf, _WEIGHTS))
    return cpu_ffi.load_grouped([leaf for leaf in leaves if len(leaf.shape) == 4], jnp.dtype(config.dtype), folder)


def _parts(config: RunnerConfig, kind: type[Any]) -> list[Any]:
    """Of the model's weights those of a kind of layer."""
    leaves = jax.tree.leaves(config.params(), is_leaf=lambda leaf: isinstance(leaf, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _quantized(weights: Any) -> list[Any]:
    leaves = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, _WEIGHTS))
    return [leaf for leaf in leaves if isinstance(leaf, _WEIGHTS)]
