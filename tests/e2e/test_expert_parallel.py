"""A model whose experts are split over devices, or spread over them, answers as the whole one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.expert_parallel import ENGINES, EXPERTS, REFERENCE
from support.own_process import found_by
from support.tensor_parallel import PROMPTS
from support.tiny_model import CONFIG, SMALL
from support.ways import assert_same_ways, transformers_greedy

from jaxllm import LLM
from jaxllm.api.errors import ValidationError
from jaxllm.models.registry import model_config
from jaxllm.parallel.collectives import expected_collectives
from jaxllm.parallel.rules import check_split, spread_experts

SEVERAL = [name for name in ENGINES if name != REFERENCE]
MODEL = model_config({**CONFIG, **EXPERTS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return found_by("support.expert_parallel", folder)


@pytest.mark.parametrize("kind", ["greedy", "seeded", "after prefix hits"])
@pytest.mark.parametrize("name", SEVERAL)
def test_tokens_are_those_of_one_device(found: dict[str, Any], name: str, kind: str):
    """All others have loaded what those that are spread have saved."""
    assert found[name][kind] == found[REFERENCE][kind]
    assert found[name]["preemptions"] > 0 and found[name]["prefix hits"] > 0


@pytest.mark.parametrize("name", SEVERAL)
def test_whatever_is_asked_in_whatever_way(found: dict[str, Any], name: str):
    """Also of replicas that do several decode steps in one launch."""
    assert_same_ways(found[name]["ways"], found[REFERENCE]["ways"])


def test_transformers_loads_what_is_saved(found: dict[str, Any], folder: Path):
    assert transformers_greedy(folder / "saved", PROMPTS, 8) == found[REFERENCE]["ways"]["texts"]


def test_the_load_of_experts_is_what_routers_choose(found: dict[str, Any], folder: Path):
    """As transformers computes them, of every token but those that nobody has read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "saved")
    expected = np.zeros((1, EXPERTS["num_experts"]), int)
    for prompt, generated in zip(PROMPTS, found[REFERENCE]["load"]["tokens"], strict=True):
        ids = [*tokenizer(prompt).input_ids, *generated[:-1]]
        with torch.no_grad():
            scores = model(torch.tensor([ids]), output_router_logits=True).router_logits
        for layer, of_layer in enumerate(each for each in scores if each is not None):
            chosen = of_layer.topk(EXPERTS["num_experts_per_tok"]).indices.numpy()
            expected[layer] += np.bincount(chosen.ravel(), minlength=expected.shape[1])
    for engine in found.values():
        assert engine["load"]["trace"] == expected.tolist()
        assert engine["load"]["metrics"] == {"0": expected[0].tolist()}


def test_devices_have_their_part_of_the_experts(found: dict[str, Any]):
    """[layers of the segment, experts, gate and up, hidden size]"""
    shapes = {
        "two replicas": [1, 8, 48, 64],
        "split over 2": [1, 8, 24, 64],
        "spread over 4": [1, 2, 48, 64],
    }
    assert {name: engine["experts"] for name, engine in found.items()} == {name: [s] for name, s in shapes.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_one_sum_adds_up_what_experts_and_the_shared_mlp_add(found: dict[str, Any], name: str):
    step, sampler = found[name]["exchanged"]
    devices = ENGINES[name].get("tensor_parallel_size", 1)
    assert {**step, **sampler} == expected_collectives(MODEL.num_layers, devices)


def test_a_size_that_does_not_divide_is_refused():
    moe = MODEL.moe
    assert moe is not None
    spread = spread_experts(dataclasses.replace(MODEL, moe=dataclasses.replace(moe, num_experts=6)))
    with pytest.raises(ValidationError, match=r"=4 does not divide the model's 6 experts. What would work: 1, 2\."):
        check_split(spread, 4)
    narrow = dataclasses.replace(MODEL, moe=dataclasses.replace(moe, intermediate_size=6))
    with pytest.raises(ValidationError, match=r"=4 does not divide the experts' intermediate size of 6\. .*: 1, 2\."):
        check_split(narrow, 4)
    shared = dataclasses.replace(MODEL, moe=dataclasses.replace(moe, shared_size=6))
    with pytest.raises(ValidationError, match=r"=4 does not divide the shared experts' intermediate size of 6"):
        check_split(shared, 4)


def test_a_model_without_experts_is_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match="enable_expert_parallel=True, and the model has no experts. Leave it"):
        LLM(tiny_model, enable_expert_parallel=True, **SMALL)
    with pytest.raises(ValidationError, match="record_expert_load=True, and the model has no experts. Leave it"):
        LLM(tiny_model, record_expert_load=True, **SMALL)
    with pytest.raises(ValidationError, match="record_expert_load=True with load_format=.null.: there is no model"):
        LLM(tiny_model, record_expert_load=True, load_format="null", **SMALL)
