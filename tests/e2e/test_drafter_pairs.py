"""Drafters beside what requests and engines may be asked for, and beside each kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.drafts import checks_that_cost, compare, counted, repeating
from support.own_process import found_by
from support.pairs import KINDS, assert_same_answer
from support.tiny_model import CONFIG

from jaxllm import LLM, SamplingParams
from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.drafter_pairs", tmp_path_factory.mktemp("drafter_pairs"))


@pytest.mark.parametrize("way", ["generated", "streamed", "after sleep"])
@pytest.mark.parametrize("drafter", ["model", "suffix"])
def test_a_drafter_over_two_devices_changes_nothing(found: dict[str, Any], drafter: str, way: str):
    """Whatever a request asks for, with preemptions, chunks and prefixes."""
    got, wanted = found[drafter][way], found["plain"]["generated"]
    assert set(got) == set(KINDS)
    for name, answer in got.items():
        assert_same_answer(answer, wanted[name], name)
    assert found[drafter]["preemptions"] and found[drafter]["right drafts"]


FAMILIES: dict[str, dict[str, Any]] = {
    # experts, and windows in every other layer
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 24},
    # latents, and experts
    "DeepseekV2": {
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "skip_tokenizer_init": True,
}


def write_family(folder: Path, family: str) -> Path:
    """A model with random weights whose scores lie far apart."""
    config = {**CONFIG, **FAMILIES[family], "architectures": [f"{family}ForCausalLM"]}
    del config["model_type"]
    random, specs = np.random.default_rng(0), decoder_specs(model_config(config))
    tensors = {
        name: (random.standard_normal(spec.tensor_shape(part)) / part.shape[-1] ** 0.5).astype(np.float32)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    tensors["lm_head.weight"] *= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, tiny_model: Path, family: str):
    """200 mixed requests, with a pool that does not hold two of them: tokens of a text, of earlier outputs too, and of
    another model, which is a plain one.
    """
    model = write_family(tmp_path, family)
    drafters: dict[str, dict[str, Any]] = {
        "ngram": {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 1},
        "suffix": {"method": "suffix", "num_speculative_tokens": 1},
        "model": {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": 1},
    }
    lengths = np.random.default_rng(3)
    prompts = [repeating(seed, int(lengths.integers(1, 65))) for seed in range(200)]
    # few tokens are likely, so that drafts are right now and then
    likely = dict.fromkeys(range(60, 63), 40.0)
    most = [90, 70, 57, 60, *(int(lengths.integers(1, 25)) for _ in range(196))]
    params = [
        SamplingParams(temperature=0.0, logit_bias=likely if index % 2 else None, max_tokens=n, ignore_eos=index < 100)
        for index, n in enumerate(most)
    ]
    with LLM(model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as plain:
        for drafter in drafters.values():
            with (
                LLM(model, **ARGUMENTS, num_gpu_blocks_override=26, speculative_config=drafter) as drafting,
                checks_that_cost(drafting, 0.0),
            ):
                compare(plain, drafting, prompts, params)
                assert counted(drafting, "num_accepted_tokens") > 100
