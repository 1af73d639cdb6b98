"""Arrays that do not belong together are refused by name, whatever would compute with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.gpu_only import gpu_only
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.lora_matmul.api import lora_matmul
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.layout import int4_weight, pack

TOKENS, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
LAYOUT = Layout(group=jnp.int32(0), page_offset=jnp.int32(0), window=jnp.int32(99))


def batch(implementation: str) -> AttentionBatch:
    tokens, one = jnp.zeros(TOKENS, jnp.int32), jnp.ones(1, jnp.int32)
    return AttentionBatch(
        token_seq=tokens,
        positions=tokens,
        token_valid=tokens == 0,
        query_start=jnp.zeros(2, jnp.int32),
        kv_lens=one,
        block_tables=jnp.ones((1, 1, 1), jnp.int32),
        num_decodes=jnp.int32(0),
        num_seqs=jnp.int32(1),
        backend=Backend(implementation=implementation, interpret=True),
    )


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


CACHE = array(4, 2 * KV_HEADS, 16, DIM)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"query": array(TOKENS, 5, DIM)}, "query must be .* a multiple of 2, 16], got .8, 5, 16"),
        ({"query": array(TOKENS, HEADS, 8)}, "query must be .* got .8, 4, 8"),
        ({"query": array(TOKENS - 1, HEADS, DIM)}, "query must be .8 .the batch's"),
        ({"query": array(TOKENS, HEADS, DIM, dtype=jnp.int32)}, "query must be of a float dtype, got int32"),
        ({"cache": array(4, 2, KV_HEADS, 16, DIM)}, "cache must be .pages, 2 . kv_heads"),
        ({"cache": array(4, 3, 16, DIM)}, "cache must be .pages, 2 . kv_heads"),
        ({"cache": CACHE.astype(jnp.int32)}, "got int32"),
        ({"cache": CACHE.astype(jnp.int8)}, "a cache of int8 needs kv_scales of shape .4, 4, 16"),
        ({"kv_scales": array(4, 2 * KV_HEADS, 16)}, "a cache of float32 takes no kv_scales"),
        ({"cache": CACHE.astype(jnp.int8), "kv_scales": array(4, 2 * KV_HEADS)}, "kv_scales must be of shape"),
        ({"sinks": array(3)}, "sinks must be of shape .4., one a query head, got .3."),
    ],
)
def test_attention_refuses(implementation: str, changed: dict[str, Any], text: str):
    operands = {"query": array(TOKENS, HEADS, DIM), "cache": CACHE, **changed}
    with pytest.raises(ValueError, match=text):
        paged_attention(layout=LAYOUT, batch=batch(implementation), scale=1.0, **operands)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"key": array(TOKENS, 3, DIM)}, "key must be .* 2, 16], got .8, 3, 16"),
        ({"value": array(TOKENS, KV_HEADS, 8)}, "value must be .* got .8, 2, 8"),
        ({"cache": CACHE.astype(jnp.int8)}, "needs kv_scales"),
    ],
)
def test_writing_refuses(implementation: str, changed: dict[str, Any], text: str):
    rows = array(TOKENS, KV_HEADS, DIM)
    operands = {"cache": CACHE, "key": rows, "value": rows, **changed}
    with pytest.raises(ValueError, match=text):
        write_kv(layout=LAYOUT, batch=batch(implementation), **operands)


def operations(backend: Backend) -> dict[str, Callable[[], Any]]:
    """Every operation as it launches a kernel."""
    x, rows = array(4, 64, dtype=jnp.bfloat16), array(TOKENS, KV_HEADS, DIM)
    sizes, experts = jnp.array([2, 2], jnp.int32), array(2, 32, 64, dtype=jnp.bfloat16)
    groups = array(2, 32, dtype=jnp.bfloat16), array(2, 32, dtype=jnp.uint8)
    weight = int4_weight(array(32, 32, dtype=jnp.uint8), *groups)
    step = dataclasses.replace(batch("triton"), backend=backend)
    return {
        "paged_attention": lambda: paged_attention(array(TOKENS, HEADS, DIM), CACHE, LAYOUT, step, scale=1.0),
        "kv_write": lambda: write_kv(CACHE, rows, rows, LAYOUT, step),
        "grouped_matmul": lambda: grouped_matmul(x, experts, sizes, backend=backend),
        "lora_matmul": lambda: lora_matmul(x, array(2, 8, 64), array(2, 8, 32), sizes.repeat(2), backend=backend),
        "quant_matmul": lambda: quant_matmul(x, weight, backend=backend),
    }


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
@pytest.mark.parametrize("operation", operations(Backend()))
def test_a_kernel_without_a_gpu_says_what_would_work(operation: str, implementation: str, compiled: bool):
    run = operations(Backend(implementation=implementation))[operation]
    with pytest.raises(ValueError, match=rf"{operation}.* needs a GPU.*'cpu'.*implementation='xla'.*interpret=True"):
        (jax.jit(run) if compiled else run)()


def test_a_kernel_may_be_traced_without_a_gpu():
    """For one that is elsewhere: nothing of the check is left in its program."""
    call = gpu_only(lambda x, y: x + y, name="sum", implementation="triton")
    traced = jax.jit(call).trace(array(2), array(2))
    plain = jax.jit(lambda x, y: x + y).trace(array(2), array(2))
    ours, without = (t.lower(lowering_platforms=("cuda",)).as_text().splitlines() for t in (traced, plain))
    # the first line has the function's name
    assert "gpu_only" in str(traced.jaxpr) and ours[1:] == without[1:]
    with pytest.raises(ValueError, match="needs a GPU"):
        traced.lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": array(4, 63)}, r"w must be .E, N, K. beside x .M, K., got w .2, 32, 64. and x .4, 63."),
        ({"w": array(32, 64)}, r"got w .32, 64."),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, r"group_sizes must be int32 .2., got int32 .3."),
        ({"group_sizes": jnp.zeros(2)}, r"group_sizes must be int32 .2., got float32"),
        ({"w": array(2, 32, 64, dtype=jnp.bfloat16)}, "one dtype .* got float32 and bfloat16"),
        ({"w": array(3, 2, 32, 64), "layer": jnp.float32(0)}, "layer must be an int32 scalar, got float32 .."),
        ({"w": array(3, 2, 32, 64), "layer": jnp.zeros(1, jnp.int32)}, r"layer must be an int32 scalar, got int32 .1"),
    ],
)
def test_grouped_products_refuse(implementation: str, changed: dict[str, Any], text: str):
    given = {"x": array(4, 64), "w": array(2, 32, 64), "group_sizes": jnp.zeros(2, jnp.int32), **changed}
    with pytest.raises(ValueError, match=text):
        grouped_matmul(**given, backend=Backend(implementation=implementation, interpret=True))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    ("x", "packed", "groups", "layer", "text"),
    [
        (array(4, 63), (32, 32), (2, 32), None, r"the weight must be .N, K. .* got .32, 64. and .4, 63."),
        (array(4, 64), (3, 32, 32), (3, 2, 32), None, r"got .3, 32, 64. and .4, 64."),
        (array(4, 64, dtype=jnp.int32), (32, 32), (2, 32), None, "x must be one of .* got int32"),
        (array(4, 64), (3, 32, 32), (3, 2, 32), jnp.float32(1), "layer must be an int32 scalar, got float32"),
        # groups of 48: K = 64 has no whole number of them, nor has a K of 30 groups of an even number
        (array(4, 64), (32, 32), (64 // 48, 31), None, r"packed .32, 32. .* got .1, 31."),
        (array(4, 64), (32, 32), (5, 32), None, "an even number of elements g that divides K, got .5, 32."),
        (array(4, 30), (32, 15), (2, 32), None, "an even number of elements g that divides K, got .2, 32."),
    ],
)
def test_four_bit_products_refuse(
    implementation: str, x: jax.Array, packed: tuple[int, ...], groups: tuple[int, ...], layer: Any, text: str
):
    arrays = array(*packed, dtype=jnp.uint8), array(*groups, dtype=jnp.bfloat16), array(*groups, dtype=jnp.uint8)
    with pytest.raises(ValueError, match=text):
        quant_matmul(
            x, int4_weight(*arrays), backend=Backend(implementation=implementation, interpret=True), layer=layer
        )


@pytest.mark.parametrize(("group_size", "k"), [(48, 64), (3, 63), (0, 64)])
def test_packing_refuses_groups_that_do_not_divide(group_size: int, k: int):
    with pytest.raises(ValueError, match=f"group_size must be even and divide K = {k}, got {group_size}"):
        pack(array(2, k, dtype=jnp.uint8), group_size)
