"""A model whose cache has latents, through the whole engine: over several devices it answers as on one, with requests
that are preempted, prompts in chunks, and prefixes out of the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.latent_cache import DEEPSEEK, ENGINES
from support.offloading import assert_came_back
from support.own_process import found_by
from support.tensor_parallel import PROMPTS
from support.ways import assert_same_ways, transformers_greedy

from jaxllm import LLM
from jaxllm.api.errors import ValidationError
from jaxllm.parallel.collectives import expected_collectives

SEVERAL = [name for name in ENGINES if name != "one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What engines over several devices answered, in one process of their own."""
    return found_by("support.latent_cache", folder)


@pytest.mark.parametrize("engine", SEVERAL)
def test_tokens_are_those_of_one_device(found: dict[str, Any], engine: str):
    assert found[engine]["greedy"] == found["one"]["greedy"]
    np.testing.assert_allclose(found[engine]["prompt logprobs"], found["one"]["prompt logprobs"], atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_were_preempted_and_found_their_prefix(found: dict[str, Any], engine: str):
    assert found[engine]["preemptions"] > 0 and found[engine]["prefix hits"] > 0
    assert found[engine]["after prefix hits"] == [found["one"]["greedy"][2]]


@pytest.mark.parametrize("engine", SEVERAL)
def test_what_leaves_the_devices_comes_back(found: dict[str, Any], engine: str):
    assert_came_back(found[engine]["offloaded"])
    assert found[engine]["offloaded"]["tokens"] == found["one"]["offloaded"]["tokens"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_device_has_all_latents(found: dict[str, Any], engine: str):
    """Of its layers. What devices exchange is what they would without latents."""
    layers, width = DEEPSEEK["num_hidden_layers"], DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"]
    stages = ENGINES[engine].get("pipeline_parallel_size", 1)
    assert found[engine]["bytes a token"] == layers // stages * width * 4
    if stages > 1:
        return
    step, sampler = found[engine]["exchanged"]
    devices = ENGINES[engine].get("tensor_parallel_size", 1)
    assert {**step, **sampler} == expected_collectives(layers, devices)


def test_latents_in_8_bits_differ_by_rounding(found: dict[str, Any]):
    """Beside two devices, preempted requests, chunks, prefixes out of the cache and off the host. Of these weights the
    log-probabilities lie between -2 and -21.
    """
    rounded, one = found["rounded"], found["one"]
    layers, width = DEEPSEEK["num_hidden_layers"], DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"]
    assert rounded["bytes a token"] == layers * (width + 4)
    off = np.abs(np.subtract(rounded["prompt logprobs"], one["prompt logprobs"]))
    assert 1e-5 < off.max() < 1 and off.mean() < 0.2
    assert rounded["preemptions"] > 0 and rounded["prefix hits"] > 0
    assert rounded["after prefix hits"] == [rounded["greedy"][2]]
    assert_came_back(rounded["offloaded"])


@pytest.mark.parametrize(
    ("overrides", "arguments", "text"),
    [
        ({"attention_bias": True}, {}, "attention_bias=true is not supported for latent attention"),
        ({"scoring_func": "softmax"}, {}, "scoring_func='softmax' is not supported; only 'sigmoid' is."),
        (
            {"num_experts_per_tok": 5},
            {},
            "5 of n_routed_experts=8 cannot be chosen in the topk_group=2",
        ),
        ({}, {"deterministic": True}, "deterministic=True is not available for models with latent attention"),
        (
            {},
            {"tensor_parallel_size": 3},
            r"does not divide the model's 4 attention heads\. What would work: 1, 2, 4\.",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path: Path, overrides: dict, arguments: dict, text: str):
    (tmp_path / "config.json").write_text(json.dumps({**DEEPSEEK, **overrides}))
    with pytest.raises(ValidationError, match=text):
        LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, **arguments)


@pytest.mark.parametrize("engine", SEVERAL)
def test_whatever_is_asked_in_whatever_way(found: dict[str, Any], engine: str):
    """Over several devices and in stages, with several decode steps in one launch, with priorities."""
    assert_same_ways(found[engine]["ways"], found["one"]["ways"])


def test_transformers_loads_what_is_saved(found: dict[str, Any], folder: Path):
    """Saved by an engine over four devices."""
    assert transformers_greedy(folder / "saved", PROMPTS, 8) == found["one"]["ways"]["texts"]


@pytest.mark.parametrize("engine", SEVERAL)
def test_the_load_of_experts_is_that_of_one_device(found: dict[str, Any], engine: str):
    """Also counted in stages, and in several decode steps of one launch."""
    load, one = found[engine]["load"], found["one"]["load"]
    assert load == one and load["metrics"] == {"1": load["trace"][0]}
    length = sum(map(len, PROMPTS)) + sum(len(ids) - 1 for ids in one["tokens"])
    assert sum(load["trace"][0]) == DEEPSEEK["num_experts_per_tok"] * length
