"""Replicas that have a model's experts between them step together, and answer as one device does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.expert_parallel import EXPERTS, write_model
from support.own_process import found_by
from support.tiny_model import CONFIG, SMALL

from jaxllm import LLM
from jaxllm.api.errors import ValidationError
from jaxllm.models.registry import model_config
from jaxllm.parallel.collectives import expected_collectives
from jaxllm.parallel.rules import check_split, exchanging_layers, spread_experts

MODEL = model_config({**CONFIG, **EXPERTS})
TOKENS = [
    "greedy",
    "seeded",
    "after prefix hits",
    "structured",
    "many",
    "several",
    "penalised, after prefix hits",
    "one request",
    "uneven",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.joint_replicas", tmp_path_factory.mktemp("joint"))


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_are_those_of_one_device(found: dict[str, Any], kind: str):
    assert found["together"][kind] == found["one"][kind]


def test_the_load_of_experts_is_that_of_one_device(found: dict[str, Any]):
    """Each replica counts its own tokens."""
    assert found["together"]["load"] == found["one"]["load"]


@pytest.mark.parametrize("kind", ["prompt logprobs", "logprobs"])
def test_log_probabilities_are_those_of_one_device(found: dict[str, Any], kind: str):
    np.testing.assert_allclose(found["together"][kind], found["one"][kind], atol=1e-4, rtol=1e-4)


def test_the_laws_hold(found: dict[str, Any]):
    for name in ("generation_tokens", "num_preemptions", "prefix_cache_hits"):
        assert set(found[name]) == {"0", "1"} and min(found[name].values()) > 0
    assert found["compiled"] == {} and found["cache stays"]
    assert found["pages"] == [0, 0] and found["left"] == [0, 0, 0]


def test_experts_are_spread_over_all_devices(found: dict[str, Any]):
    """[layers of the segment, experts, gate and up, hidden size], of eight experts on four devices"""
    assert found["experts"] == [[1, 2, 48, 64]]
    assert found["weights"][0] == found["weights"][1]
    assert found["world"] == [4, 2]


def test_what_is_exchanged(found: dict[str, Any]):
    """Each device gets the tokens of both replicas, and of what all devices add to them those of its own replica."""
    exchanging = exchanging_layers(MODEL, 2)
    assert exchanging == 1
    step, sampler = found["exchanged"]["count"]
    total = {kind: step.get(kind, 0) + sampler.get(kind, 0) for kind in {*step, *sampler}}
    assert total == found["explained"]
    assert total == expected_collectives(MODEL.num_layers, 2, exchanging=exchanging)
    tokens, size = found["exchanged"]["tokens"], 4 * MODEL.hidden_size
    # and which of them are padding
    assert found["exchanged"]["bytes"][0] == {
        "all-gather": 2 * tokens * size + 2 * tokens,
        "reduce-scatter": tokens * size,
        "all-reduce": 5 * tokens * size,
    }


@pytest.mark.parametrize("what", ["device", "host", "interrupt", "abandoned"])
def test_what_ends_one_ends_all_and_they_go_on(found: dict[str, Any], what: str):
    assert found["broken"][what] is False
    assert found["broken"][f"after {what}"] == found["one"]["many"]


def test_their_weights_sleep_and_change(found: dict[str, Any]):
    changed = found["changed"]
    for kind in ("sleep 1", "sleep 2", "own weights"):
        assert changed[kind] == found["one"]["many"]
    others = changed["other weights"]
    assert others == [others[0]] * 4 and others[0] != found["one"]["many"][0]


def test_sizes_that_do_not_divide_are_refused():
    spread: Any = spread_experts(MODEL)
    check_split(spread, 2, replicas=4)
    six = dataclasses.replace(spread, moe=dataclasses.replace(spread.moe, num_experts=6))
    with pytest.raises(ValidationError) as raised:
        check_split(six, 2, replicas=2)
    assert str(raised.value) == (
        "data_parallel_size=2 x tensor_parallel_size=2 does not divide the model's 6 experts. What would work: "
        "data_parallel_size=2 with tensor_parallel_size=1; or tensor_parallel_size=2 with data_parallel_size=1, 3."
    )
    with pytest.raises(ValidationError, match=r"heads.*: data_parallel_size=2 with tensor_parallel_size=1, 2, 4\.$"):
        check_split(spread, 3, replicas=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, r"=2 and pipeline_parallel_size=2: .*and\s+tensor_parallel_size=2, or leave"),
        ({"num_decode_steps": 4}, r"=2 and num_decode_steps=4: .*Set num_decode_steps=1\."),
        ({"runner": "pooling", "convert": "embed"}, "is only available for models that generate. Leave enable_expert"),
        ({"deterministic": True}, "=True with data_parallel_size=2 and enable_expert_parallel=True: sums over devices"),
        ({"tensor_parallel_size": 2}, r"data_parallel_size=2 x tensor_parallel_size=2 needs 4 devices; JAX has 1 of"),
        ({}, r"data_parallel_size=2 needs as many devices; JAX has 1 of .*JAX_NUM_CPU_DEVICES=2"),
    ],
)
def test_what_they_cannot_do_is_refused(sparse_model: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        LLM(sparse_model, data_parallel_size=2, enable_expert_parallel=True, **{**SMALL, **arguments})


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert len(jax.devices()) == 1  # no engine makes more of them
    folder = tmp_path_factory.mktemp("sparse") / "model"
    write_model(folder)
    return folder


def test_a_model_without_experts_is_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match="enable_expert_parallel=True, and the model has no experts. Leave it"):
        LLM(tiny_model, data_parallel_size=2, enable_expert_parallel=True, **SMALL)


def test_tokens_are_sent_to_the_copies_that_have_their_experts(found: dict[str, Any]):
    """Of four copies with 256 tokens of 16 numbers each, which go to one expert each: there and back, and the expert's
    weight and number. Where too many go to one copy, all copies get all of them.
    """
    sent, room = found["sent"], 96
    assert max(sent["errors"]) < 1e-4
    assert sent["sent"] == [4 * room * 2 * 4, 4 * room * 16 * 4, 4 * room * 16 * 4]
    size = sent["tokens"] * 16 * 4
    assert sent["gathered"]["all-gather"] >= 4 * size and sent["gathered"]["reduce-scatter"] == size
    assert sum(sent["sent"]) < (4 * size + 4 * size) / 2
