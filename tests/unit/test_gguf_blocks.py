"""Weights in the blocks of a GGUF file are what the gguf package says, as matrices and as tables."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from support.stored_weights import F32

from jaxllm.layers.context import Context
from jaxllm.layers.embedding import embed, unembed
from jaxllm.layers.linear import PIECE
from jaxllm.runner import adapter_stacks
from pallas_kernels.gguf_blocks import BLOCKS, BlockWeight
from pallas_kernels.quantized import dense


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_gguf_packages(kind: str):
    number = GGMLQuantizationType[kind]
    block, nbytes, _ = BLOCKS[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (block, nbytes)
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (3 * 4, nbytes), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for start in {**halves, "Q6_K": (208,), "MXFP4": ()}.get(kind, (0,)):
        raw[:, start : start + 2] = random.normal(0, 0.1, (12, 1)).astype("<f2").view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = random.integers(0, 150, 12)
    raw = raw.reshape(3, 4 * nbytes)
    ours = BlockWeight(data=jnp.asarray(raw), kind=kind)
    assert ours.shape == (3, 4 * block)
    theirs = gguf.quants.dequantize(raw, number)
    # a product and a sum, which a compiler may make one
    np.testing.assert_allclose(ours.dequantize(F32), theirs, rtol=1e-6, atol=1e-9)


def test_a_table_in_blocks_is_widened_in_pieces():
    """Two whole ones and a rest; rows of it are looked up."""
    random, size = np.random.default_rng(1), 2 * PIECE // 1024 + 37
    raw = gguf.quants.quantize(random.standard_normal((size, 1024), np.float32), GGMLQuantizationType.Q8_0)
    table = gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0)
    hidden = random.standard_normal((3, 1024), np.float32)
    stored = BlockWeight(data=jnp.asarray(raw), kind="Q8_0")
    scores = jax.jit(unembed, static_argnums=(0, 3))(Context(), jnp.asarray(hidden), stored, size)
    np.testing.assert_allclose(scores, hidden @ table.T, atol=1e-3)
    tokens = np.array([0, size - 1, 5, 5])
    np.testing.assert_array_equal(embed(Context(), stored, jnp.asarray(tokens), jnp.dtype("float32")), table[tokens])


def test_a_table_in_blocks_that_an_adapter_changes_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch):
    random, size, widened = np.random.default_rng(2), 2 * PIECE // 1024 + 37, []
    raw = gguf.quants.quantize(random.standard_normal((size, 1024), np.float32), GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(adapter_stacks, "dense", lambda part, dtype: widened.append(part.shape) or dense(part, dtype))
    found = adapter_stacks.whole_table(BlockWeight(data=jnp.asarray(raw), kind="Q8_0"), size - 5)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0)[: size - 5])
    assert set(widened) == {(PIECE // 1024, 1024)}
