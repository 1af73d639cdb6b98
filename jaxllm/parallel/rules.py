"""Which axis of each weight is split over the devices, and what one device's part of a model is.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): attention by heads, the MLP by its intermediate size, so that
a layer needs two all-reduces; the embedding and the head by the vocabulary. KV heads fewer than devices are repeated:
neighbouring devices hold the same one.
"""
# Trees of shapes and of axes have the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder import DecoderConfig, Layers, Params
from jaxllm.models.layer_stack import separate
from jaxllm.models.sources import decoder_sources, separate_sources
from jaxllm.parallel.mesh import TENSOR

#: the array's axis that is split, where layers are stacked; -1: every device has the array whole
WHOLE = -1
AXES = Params(
    embedding=0,
    layers=Layers(
        attention_norm=WHOLE,
        # a device's rows are its query heads, its key heads, its value heads
        qkv=1,
        qkv_bias=1,
        query_norm=WHOLE,
        key_norm=WHOLE,
        output=2,
        post_attention_norm=WHOLE,
        mlp_norm=WHOLE,
        # a device's rows are its part of the gate, then of the up projection
        gate_up=1,
        down=2,
        post_mlp_norm=WHOLE,
    ),
    norm=WHOLE,
    head=0,
)
#: the KV cache [pages, 2, kv_heads, block_size, head_dim]
CACHE = jax.P(None, None, TENSOR)


def check_split(model: DecoderConfig, devices: int) -> None:
    """Whether a model can be split over so many devices.

    Raises:
        ValidationError: it cannot; the text names the numbers that would do.
    """
    problem = _problem(model, devices)
    if problem:
        fitting = ", ".join(str(n) for n in split_sizes(model))
        raise ValidationError(f"tensor_parallel_size={devices} does not divide {problem}. What would work: {fitting}.")


def split_sizes(model: DecoderConfig) -> list[int]:
    """Every number of devices that a model can be split over, ascending."""
    return [n for n in range(1, model.num_heads + 1) if not _problem(model, n)]


def _problem(model: DecoderConfig, devices: int) -> str | None:
    kv_heads = model.num_kv_heads
    if model.num_heads % devices:
        return f"the model's {model.num_heads} attention heads"
    if kv_heads % devices and devices % kv_heads:
        return f"the model's {kv_heads} KV heads, nor is it a multiple of them"
    if model.intermediate_size % devices:
        return f"the model's intermediate size of {model.intermediate_size}"
    return None


def local_model(model: DecoderConfig, devices: int) -> DecoderConfig:
    """What one device computes of a model that can be split (`check_split`). The vocabulary stays whole: logits are."""
    if devices == 1:
        return model
    return dataclasses.replace(
        model,
        num_heads=model.num_heads // devices,
        num_kv_heads=max(model.num_kv_heads // devices, 1),
        intermediate_size=model.intermediate_size // devices,
    )


def split_axes(devices: int) -> tuple[tuple[str, str], ...]:
    """The logical axes split over so many devices, each with its mesh axis (`layers.context.Context.split`)."""
    return () if devices == 1 else tuple((name, TENSOR) for name in ("heads", "kv_heads", "mlp", "vocab"))


def local_sources(model: DecoderConfig, devices: int, *, stacked: bool = True) -> Params:
    """A tree whose leaves have the `shape`s of one device's weights. The vocabulary is filled up to a multiple.

    Args:
        stacked: in which form the layers are (`models.layer_stack`).
    """
    part = local_model(model, devices)
    sources = decoder_sources(dataclasses.replace(part, vocab_size=-(-model.vocab_size // devices)))
    return sources if stacked else separate_sources(sources, model.num_layers)


def split_shapes(model: DecoderConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh, *, stacked: bool = True) -> Params:
    """`jax.ShapeDtypeStruct`s with shardings of a model's weights over a mesh, as `local_sources` has their parts."""
    devices = mesh.size

    def one(axis: int, source: object) -> jax.ShapeDtypeStruct | None:
        if source is None:
            return None
        shape = list(source.shape)  # pyright: ignore[reportAttributeAccessIssue]
        spec = jax.P()
        if axis != WHOLE:
            shape[axis] *= devices
            spec = jax.P(*[None] * axis, TENSOR)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def of_layer(whole: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
        assert isinstance(whole.sharding, jax.sharding.NamedSharding)
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*whole.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(whole.shape[1:], dtype, sharding=sharding)

    params = jax.tree.map(one, AXES, local_sources(model, devices), is_leaf=lambda leaf: isinstance(leaf, int))
    if stacked:
        return params
    return dataclasses.replace(params, layers=separate(params.layers, model.num_layers, of_layer))
