"""Keys and values in 8 bits: logits are those of transformers, whose cache rounds the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel
from test_families import FAMILIES, load, random_model

torch = pytest.importorskip("torch")

LENGTH = 110


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "block_size"),
    [("gemma2", "fp8", jnp.float8_e4m3fn, 64), ("qwen3", "fp8_e5m2", jnp.float8_e5m2, 8)],
)
def test_logits_equal_transformers_with_a_rounded_cache(
    name: str, kind: str, dtype: Any, block_size: int, tmp_path: Path
):
    """With windows and soft caps; in chunks, which attend to their own tokens as rounded as to those before."""
    from support.rounded_cache import RoundedCache

    model = random_model(FAMILIES[name], seed=11)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(5).integers(257, size=LENGTH).tolist()
    with torch.no_grad():
        plain, expected = (
            model(torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None).logits[0].numpy()
            for cache in (None, RoundedCache(kind))
        )
    config, params = load(tmp_path, jnp.float32)
    paged = PagedModel(config, params, block_size=block_size, max_len=128, buckets=(64,), num_seqs=2, cache_dtype=dtype)
    ends = [1, 2, 64, 101, *range(102, LENGTH + 1)]
    got = np.concatenate([paged.step({"a": ids[first:end]})["a"] for first, end in zip([0, *ends], ends, strict=False)])
    assert np.abs(expected - plain).max() > 1e-2, "rounding this small would hide an error"
    assert np.abs(got - expected).max() < 1e-4
