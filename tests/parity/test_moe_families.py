"""Families with experts against transformers, as `test_families` does with the dense ones, and the two forms in which
checkpoints have experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.paged_model import PagedModel
from test_families import (
    DECODES,
    LENGTHS,
    MAX_LEN,
    Case,
    Family,
    hf_logits,
    load,
    mixed_chunks,
    random_model,
)

from jaxllm.models import whole_sequences
from jaxllm.models.specs import decoder_specs
from jaxllm.weights.formats import hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: tokens, and most sequences, of a step
BUCKET = 64
COMMON: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
#: experts as DeepSeek-V3 has them
CORRECTED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "qwen2-moe": Family(
        "Qwen2Moe",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 44,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,
        },
        bucket=BUCKET,
    ),
    "olmoe": Family(
        "Olmoe",
        {**COMMON, "intermediate_size": 20, "num_experts": 12, "num_experts_per_tok": 3, "clip_qkv": 1.5},
        bucket=BUCKET,
    ),
    "gpt-oss": Family(
        "GptOss",
        {
            **COMMON,
            "intermediate_size": 28,
            "head_dim": 20,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "sliding_window": 33,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 256,
            },
        },
        bucket=BUCKET,
    ),
    "mixtral": Family(
        "Mixtral",
        {**COMMON, "intermediate_size": 36, "num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": 40},
        bucket=BUCKET,
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "head_dim": 20,
            "moe_intermediate_size": 28,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            # a dense layer by each of the two rules, so three segments: of one layer, of two, of one
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0, 3],
        },
        bucket=BUCKET,
    ),
}
#: what sets these apart has nothing to do with pages
VARIANTS = {
    "glm4-moe": Family(
        "Glm4Moe",
        {
            **COMMON,
            **CORRECTED,
            "head_dim": 24,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
        bucket=BUCKET,
    ),
    "dots1": Family(
        "Dots1",
        {**COMMON, **CORRECTED, "head_dim": 20, "sliding_window": 40, "max_window_layers": 1, "norm_topk_prob": True},
        bucket=BUCKET,
    ),
    "minimax-m2": Family(
        "MiniMaxM2",
        {
            **COMMON,
            "intermediate_size": 20,
            "head_dim": 24,
            "rotary_dim": 12,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
        },
        bucket=BUCKET,
    ),
    "granite-moe": Family(
        "GraniteMoeShared",
        {
            **COMMON,
            "intermediate_size": 20,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 28,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.8,
        },
        bucket=BUCKET,
    ),
    "flex-olmo": Family(
        "FlexOlmo",
        {**COMMON, "intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3},
        bucket=BUCKET,
    ),
    "ernie4.5-moe": Family(
        "Ernie4_5_Moe",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_num_experts": 12,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 20,
            "moe_layer_end_index": 1,
        },
        bucket=BUCKET,
    ),
}
#: in pages, and by themselves
PAGED = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in VARIANTS)]
ALL = [*FAMILIES, *VARIANTS]


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, Any, Path]]:
    family, name = {**FAMILIES, **VARIANTS}[request.param], request.param
    model = random_model(family, seed=sum(name.encode()))
    directory = tmp_path_factory.mktemp(name)
    model.save_pretrained(directory)
    config, params = load(directory, jnp.float32)
    draw = np.random.default_rng(7)
    tokens = {f"{n}": draw.integers(config.vocab_size, size=n + DECODES).tolist() for n in LENGTHS}
    yield (
        Case(config, params, family, tokens, {at: hf_logits(model, ids) for at, ids in tokens.items()}),
        model,
        directory,
    )
    jax.clear_caches()


def paged(case: Case) -> PagedModel:
    """Always of the same shapes, so that all tests of a family run one program."""
    return PagedModel(case.config, case.params, block_size=16, max_len=MAX_LEN, buckets=(BUCKET,), num_seqs=BUCKET)


@pytest.mark.parametrize("made", PAGED, indirect=True)
def test_logits_equal_transformers(made: tuple[Case, Any, Path]):
    case, model = made[0], paged(made[0])
    got = {name: [] for name in case.tokens}
    for step in mixed_chunks(case):
        for name, scores in model.step(step).items():
            got[name].append(scores)
    scores = np.concatenate([part for name in case.tokens for part in got[name]])
    expected = np.concatenate(list(case.expected.values()))
    assert scores.shape == expected.shape and np.std(expected) > 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("made", PAGED, indirect=True)
@pytest.mark.parametrize("batch", [1, 5, BUCKET])
def test_every_batch_equals_transformers(made: tuple[Case, Any, Path], batch: int):
    """Steps of a single token of each sequence."""
    case, model, _ = made
    rows = np.random.default_rng(batch).integers(case.config.vocab_size, size=(batch, 5))
    with torch.no_grad():
        expected = model(torch.tensor(rows), use_cache=False).logits.numpy()
    ours = paged(case)
    for i in range(rows.shape[1]):
        scores = ours.step({f"{n}": [row[i]] for n, row in enumerate(rows.tolist())})
        got = np.stack([scores[f"{n}"][0] for n in range(batch)])
        np.testing.assert_allclose(got, expected[:, i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("made", ALL, indirect=True)
def test_whole_sequences_equal_transformers(made: tuple[Case, Any, Path]):
    case = made[0]
    rows = np.array([case.tokens["300"]])
    scores = jax.jit(whole_sequences.logits, static_argnums=0)(case.config, case.params, rows)
    np.testing.assert_allclose(scores[0], case.expected["300"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("made", ALL, indirect=True)
def test_both_forms_of_experts_are_the_same_weights(made: tuple[Case, Any, Path], tmp_path: Path):
    """An expert's tensors by themselves, as the hub has them and transformers 4 writes them, or stacked."""
    case, model, directory = made
    model.save_pretrained(tmp_path, save_original_format=False)
    stacked, single = (set(load_file(folder / "model.safetensors")) for folder in (tmp_path, directory))
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    # these have them stacked on the hub, too
    assert any(".experts.0." in name for name in single) == (case.family.model not in ("GptOss", "GraniteMoeShared"))
    _, params = load(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


@pytest.mark.parametrize("made", ALL, indirect=True)
def test_transformers_loads_what_is_saved(made: tuple[Case, Any, Path], tmp_path: Path):
    case, model, directory = made
    hugging_face.write(tmp_path, list(hugging_face.tensors(decoder_specs(case.config), case.params)))
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    for (name, ours), (_, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert json.loads((directory / "config.json").read_text())["architectures"]
