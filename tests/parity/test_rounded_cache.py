"""Keys and values in 8 bits: logits are those of transformers, whose cache rounds the same numbers."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel
from support.rounded_cache import rounded_cache
from test_families import FAMILIES, load, random_model

torch = pytest.importorskip("torch")

LENGTH = 110


def test_logits_equal_transformers_with_a_rounded_cache(tmp_path: Path):
    """With windows and soft caps; in chunks, which attend to their own tokens as rounded as to those before."""
    model = random_model(FAMILIES["gemma2"], seed=11)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(5).integers(257, size=LENGTH).tolist()
    with torch.no_grad():
        plain, expected = (
            model(torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None).logits[0].numpy()
            for cache in (None, rounded_cache("fp8_e5m2"))
        )
    config, params = load(tmp_path, jnp.float32)
    stored = jnp.dtype(jnp.float8_e5m2)
    paged = PagedModel(config, params, block_size=64, max_len=128, buckets=(64,), num_seqs=2, cache_dtype=stored)
    ends = [1, 2, 64, 101, *range(102, LENGTH + 1)]
    got = np.concatenate([paged.step({"a": ids[first:end]})["a"] for first, end in zip([0, *ends], ends, strict=False)])
    assert np.abs(expected - plain).max() > 1e-2, "rounding this small would hide an error"
    assert np.abs(got - expected).max() < 1e-4
