"""DeepSeek's families against transformers: latents in pages, queries with and without latents, yarn, routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel
from test_families import DECODES, LENGTHS, MAX_LEN, Case, Family, hf_logits, load, mixed_chunks, random_model

from jaxllm.models import whole_sequences

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 96,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
LATENTS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
}
GROUPS = {"n_group": 4, "topk_group": 2}
FAMILIES = {
    "v2-lite": Family("DeepseekV2", {**LATENTS, "q_lora_rank": None}, block_size=64, bucket=64),
    "v2": Family(
        "DeepseekV2",
        {
            **LATENTS,
            **GROUPS,
            "q_lora_rank": 24,
            "rope_parameters": YARN,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.7,
        },
        bucket=64,
    ),
    "v3": Family(
        "DeepseekV3",
        {**LATENTS, **GROUPS, "q_lora_rank": 24, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        bucket=64,
    ),
}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family = FAMILIES[request.param]
    model = random_model(family, seed=sum(request.param.encode()))
    directory: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    config, params = load(directory, jnp.float32)
    rng = np.random.default_rng(7)
    tokens = {f"{n}": rng.integers(config.vocab_size, size=n + DECODES).tolist() for n in LENGTHS}
    expected = {name: hf_logits(model, ids) for name, ids in tokens.items()}
    yield Case(config, params, family, tokens, expected)
    jax.clear_caches()


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_logits_equal_transformers(case: Case):
    """At every position of prompts in chunks, and of sequences that decode beside them."""
    model = PagedModel(case.config, case.params, block_size=case.family.block_size, max_len=MAX_LEN, buckets=(64,))
    got = {name: [] for name in case.tokens}
    for step in mixed_chunks(case):
        for name, scores in model.step(step).items():
            got[name].append(scores)
    for name, expected in case.expected.items():
        scores = np.concatenate(got[name])
        assert scores.shape == expected.shape and np.std(expected) > 0.3
        assert np.abs(scores - expected).max() < 1e-4, name


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_whole_sequences_equal_transformers(case: Case):
    """The forward pass for training."""
    rows = np.array([case.tokens["129"]])
    scores = np.asarray(jax.jit(whole_sequences.logits, static_argnums=0)(case.config, case.params, rows))
    assert np.abs(scores[0] - case.expected["129"]).max() < 1e-4


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tmp_path: Path):
    """Both round, at different places. Without experts: another one is chosen where two are about as good."""
    family = dataclasses.replace(FAMILIES["v2-lite"], fields={**FAMILIES["v2-lite"].fields, "first_k_dense_replace": 3})
    model = random_model(family, seed=11).bfloat16()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(5).integers(257, size=80).tolist()
    theirs, truth = hf_logits(model, ids), hf_logits(model.float(), ids)
    config, params = load(tmp_path, jnp.bfloat16)
    paged = PagedModel(config, params, block_size=16, max_len=96, buckets=(64,), num_seqs=2, cache_dtype=jnp.uint16)
    ends = [1, 2, 64, 76, *range(77, 81)]
    parts = [paged.step({"a": ids[first:end]})["a"] for first, end in zip([0, *ends], ends, strict=False)]
    error, their_error = (float(np.sqrt(np.mean((x - truth) ** 2))) for x in (np.concatenate(parts), theirs))
    print(f"error {error:.4f}, transformers {their_error:.4f}")
    assert error < 1.1 * their_error
