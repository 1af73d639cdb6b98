"""Compute one step of a small model whole and split over 2 and 4 devices, and compare. Prints what was compared.

Run with ``JAX_NUM_CPU_DEVICES=4``. The whole model is `models.decoder.forward` on one device; the weights are split
here, by hand, from the whole ones, so that the rules of `jaxllm.parallel` are compared with something else.
"""
# The split weights have the form of `Params`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from support.tiny_model import CONFIG

from jaxllm.config.cache import KVCacheGroup, kv_cache_groups
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.decoder import forward, logits
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config
from jaxllm.models.segments import resegment
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.collectives import count_collectives, expected_collectives
from jaxllm.parallel.mesh import make_mesh, on_each_device
from jaxllm.parallel.rules import CACHE, local_model, shapes, split_axes
from pallas_kernels.batch import AttentionBatch

BLOCK_SIZE, BLOCKS = 8, 6
#: a vocabulary that neither 2 nor 4 divides, biases, norms of heads
MODEL = dataclasses.replace(model_config(CONFIG), vocab_size=251, qkv_bias=True, qk_norm=True)

LAYERS = MODEL.num_layers


def main() -> None:
    random = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return (random.standard_normal(shape.shape) / math.sqrt(shape.shape[-1])).astype(np.float32)

    params = jax.tree.map(draw, shapes(decoder_specs(MODEL), jnp.dtype("float32"), None))
    batch = two_sequences(random, MODEL.vocab_size)
    groups = kv_cache_groups(MODEL.kv_specs)

    def cache_shape(kv_heads: int) -> tuple[int, ...]:
        return MODEL.num_layers * BLOCKS, 2 * kv_heads, BLOCK_SIZE, MODEL.head_dim

    cache = jnp.zeros(cache_shape(MODEL.num_kv_heads))
    pages, expected = jax.jit(step, static_argnums=(0, 1, 2))(groups, Context(), MODEL, params, cache, batch)
    for devices, sizes in ((2, (LAYERS,)), (4, (LAYERS,)), (2, (1,) * LAYERS)):
        mesh = make_mesh(jax.devices()[:devices])
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        wanted = shapes(resegment(decoder_specs(MODEL), sizes), jnp.dtype("float32"), whole)
        mine = resegment(split(params, devices), sizes)
        jax.tree.map(lambda array, shape: np.testing.assert_equal(array.shape, shape.shape), mine, wanted)
        part, context = local_model(MODEL, devices), Context(split=split_axes(mesh.shape))
        arguments = (
            jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), mine, wanted),
            jnp.zeros(cache_shape(part.num_kv_heads * devices), device=jax.sharding.NamedSharding(mesh, CACHE)),
            jax.device_put(batch, whole),
        )
        function = on_each_device(
            functools.partial(step, groups, context, part),
            mesh,
            jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), arguments
            ),
            (CACHE, jax.P()),
        )
        compiled = jax.jit(function).lower(*arguments).compile()
        split_pages, scores = compiled(*arguments)
        np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)
        heads = np.reshape(pages, (len(pages), 2, MODEL.num_kv_heads, BLOCK_SIZE, MODEL.head_dim))
        heads = np.repeat(heads, max(devices // MODEL.num_kv_heads, 1), axis=2)
        # each device has the keys, then the values of its heads
        parts = np.concatenate(np.split(heads, devices, axis=2), axis=1)
        repeated = parts.reshape(split_pages.shape)
        np.testing.assert_allclose(split_pages, repeated, rtol=2e-5, atol=2e-5)
        exchanged = count_collectives(compiled.as_text() or "")
        np.testing.assert_equal(exchanged, expected_collectives(MODEL.num_layers, devices))
        print(devices, *sizes)


def two_sequences(random: np.random.Generator, vocab_size: int) -> StepBatch:
    """Of 9 and of 3 tokens, each from its first one on."""
    attention = AttentionBatch(
        token_seq=jnp.asarray([0] * 9 + [1] * 3),
        positions=jnp.asarray([*range(9), *range(3)]),
        token_valid=jnp.ones(12, bool),
        query_start=jnp.asarray([0, 9, 12]),
        kv_lens=jnp.asarray([9, 3]),
        block_tables=jnp.asarray([[[1, 2], [3, 4]]]),
        num_decodes=jnp.asarray(0),
        num_seqs=jnp.asarray(2),
    )
    return StepBatch(tokens=jnp.asarray(random.integers(0, vocab_size, 12, np.int32)), attention=attention)


def step(
    groups: tuple[KVCacheGroup, ...],
    context: Context,
    model: DecoderConfig,
    params: Params,
    cache: Cache,
    batch: StepBatch,
):
    cache, hidden = forward(context, model, groups, params, cache, batch)
    return cache, logits(context, model, params, hidden)


def split(params: Params, devices: int) -> Params:
    """The weights as the devices hold them, one after the other along the axis that is split."""
    heads, kv_heads, dim = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim

    def fused_heads(array: np.ndarray) -> np.ndarray:
        """[L, (H + 2K) * D, ...] by device: its query heads, the key heads they read, the value heads they read."""
        query, key, value = np.split(
            array.reshape(len(array), heads + 2 * kv_heads, dim, -1), (heads, heads + kv_heads), 1
        )
        parts = []
        for queries in np.split(np.arange(heads), devices):
            read = sorted({int(head) // (heads // kv_heads) for head in queries})
            parts += [query[:, queries], key[:, read], value[:, read]]
        return np.concatenate(parts, 1).reshape(len(array), -1, *array.shape[2:])

    def fused_mlp(array: np.ndarray) -> np.ndarray:
        gate, up = (np.split(half, devices, axis=1) for half in np.split(array, 2, axis=1))
        return np.concatenate([half for pair in zip(gate, up, strict=True) for half in pair], axis=1)

    def vocabulary(array: np.ndarray) -> np.ndarray:
        # NaN: what is behind the vocabulary must not be seen
        return np.pad(array, ((0, -len(array) % devices), (0, 0)), constant_values=np.nan)

    [layers] = params.layers
    assert layers.qkv_bias is not None and params.head is not None
    return Params(
        embedding=vocabulary(np.asarray(params.embedding)),
        layers=(
            dataclasses.replace(
                layers,
                qkv=fused_heads(np.asarray(layers.qkv)),
                qkv_bias=fused_heads(np.asarray(layers.qkv_bias)),
                gate_up=fused_mlp(np.asarray(layers.gate_up)),
            ),
        ),
        norm=params.norm,
        norm_bias=None,
        head=vocabulary(np.asarray(params.head)),
    )


if __name__ == "__main__":
    main()
