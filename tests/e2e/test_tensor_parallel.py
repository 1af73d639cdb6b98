"""A model split over devices answers as the whole one does; what devices exchange; what cannot be split is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.own_process import found_by
from support.tensor_parallel import ARGUMENTS, DEVICES
from support.tiny_model import CONFIG, VOCAB_SIZE

from jaxllm import LLM, Explanation
from jaxllm.api.errors import ValidationError
from jaxllm.parallel.collectives import expected_collectives
from jaxllm.planning.layout import KV_CACHE
from jaxllm.runner.capacities import row_capacity

SPLIT = [n for n in DEVICES if n > 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What engines over several devices answered, in one process of their own."""
    return found_by("support.tensor_parallel", tmp_path_factory.mktemp("split"))


@pytest.mark.parametrize("kind", ["greedy", "seeded", "after prefix hits", "structured"])
@pytest.mark.parametrize("devices", SPLIT)
def test_tokens_are_those_of_one_device(found: dict[str, Any], devices: int, kind: str):
    assert found[str(devices)][kind] == found["1"][kind]


@pytest.mark.parametrize("devices", DEVICES)
def test_requests_were_preempted_and_found_their_prefix(found: dict[str, Any], devices: int):
    assert found[str(devices)]["preemptions"] > 0 and found[str(devices)]["prefix hits"] > 0
    assert found["1"]["structured"] in ("yes", "no", "perhaps")


@pytest.mark.parametrize("kind", ["prompt logprobs", "logprobs"])
@pytest.mark.parametrize("devices", SPLIT)
def test_log_probabilities_are_those_of_one_device(found: dict[str, Any], devices: int, kind: str):
    np.testing.assert_allclose(found[str(devices)][kind], found["1"][kind], rtol=1e-4, atol=1e-4)


def test_a_split_encoder_pools_as_the_whole_one(found: dict[str, Any]):
    """`test_pairs.py` has a decoder that pools, and several decode steps in one launch."""
    whole, split = found["embeddings"]
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-5)


#: whose logits a program has room for
ROWS = row_capacity(ARGUMENTS["max_num_seqs"], "cpu")


@pytest.mark.parametrize("devices", DEVICES)
def test_devices_exchange_what_they_must(found: dict[str, Any], devices: int):
    """Two sums of the hidden states a layer and one for the embedding; the logits once, filled up by the vocabulary."""
    exchanged, layers = found[str(devices)]["exchanged"], CONFIG["num_hidden_layers"]
    step, sampler = exchanged["count"]
    assert {**step, **sampler} == expected_collectives(layers, devices)
    if devices == 1:
        return
    hidden = exchanged["tokens"] * CONFIG["hidden_size"] * 4
    rows, words = ROWS, -(-VOCAB_SIZE // devices) * devices
    assert exchanged["bytes"] == [{"all-reduce": (2 * layers + 1) * hidden}, {"all-gather": rows * words * 4}]


@pytest.mark.parametrize("devices", DEVICES)
def test_an_engine_explains_where_its_arrays_lie(found: dict[str, Any], devices: int):
    explained = found[str(devices)]["explained"]
    said = Explanation.from_dict(explained["said"])
    weights = [layout for layout in said.layouts if layout.name != KV_CACHE]
    assert {layout.name: [list(layout.device_shape), layout.dtype] for layout in weights} == explained["parts"]
    assert sum(layout.device_bytes for layout in weights) == said.plan.memory.weight_bytes
    assert said.layouts[-1].device_bytes == said.plan.memory.kv_cache_bytes
    assert {layout.name for layout in weights if layout.is_split} == (
        {"embedding", "head", "layers.qkv", "layers.output", "layers.gate_up", "layers.down"} if devices > 1 else set()
    )
    # four KV heads on eight devices; 257 words
    notes = {layout.name: note for layout in said.layouts if (note := layout.note(said.mesh))}
    filled = {"embedding": "filled up with zeros", "head": "filled up with zeros"} if devices > 1 else {}
    shared = {"layers.qkv": "neighbours share heads", KV_CACHE: "neighbours share heads"} if devices == 8 else {}
    assert notes == {**filled, **shared}
    assert all(name in explained["text"] for name in explained["parts"])
    assert explained["html"].count("<svg") == 1 and explained["html"].count("activations (") == devices


@pytest.mark.parametrize("devices", SPLIT)
def test_an_engine_explains_what_its_steps_exchange(found: dict[str, Any], devices: int):
    """Two sums of the hidden states a layer, and of the vocabulary one sum and the logits."""
    said = Explanation.from_dict(found[str(devices)]["explained"]["said"])
    layers, hidden = CONFIG["num_hidden_layers"], CONFIG["hidden_size"] * 4
    words = -(-VOCAB_SIZE // devices) * devices * 4
    assert [(step.tokens, step.requests) for step in said.steps] == [(1, 1), (4, 4), (32, 4)]
    for step in said.steps:
        assert not step.not_compiled
        times: dict[str, int] = {}
        for exchange in step.exchanges:
            times[exchange.kind] = times.get(exchange.kind, 0) + exchange.times
            assert exchange.devices == devices and exchange.seconds is None
        assert times == expected_collectives(layers, devices)
        sums = {exchange.over: exchange for exchange in step.exchanges if exchange.kind == "all-reduce"}
        assert {over: (each.times, each.times_a_layer) for over, each in sums.items()} == {
            "heads": (layers, 1),
            "mlp": (layers, 1),
            "vocab": (1, 0),
        }
        padded = {1: 1, 4: 32, 32: 32}[step.tokens]
        assert all(exchange.bytes == padded * hidden for exchange in sums.values())
        [logits] = (exchange for exchange in step.exchanges if exchange.kind == "all-gather")
        assert logits.over == "vocab" and logits.bytes == ROWS * words
    if devices == 4:
        planned = Explanation.from_dict(found["planned"])
        assert planned.steps == said.steps and planned.layouts[:-1] == said.layouts[:-1]


@pytest.mark.parametrize(
    "kind", ["sleep 1", "sleep 2", "own weights", "named weights", "saved as safetensors", "saved as orbax"]
)
def test_weights_come_back(found: dict[str, Any], kind: str):
    assert found["changed"][kind] == found["1"]["greedy"]


def test_other_weights_are_used_where_their_devices_are_known(found: dict[str, Any]):
    changed = found["changed"]
    assert changed["other weights"] != found["1"]["greedy"]
    assert "must be split over the engine's 8 devices as apply_model shows it" in changed["refused"]
    assert changed["not trained"].startswith("to_nnx takes an engine on one device")
    # 257 words over eight devices
    assert changed["shards"] == [[33, CONFIG["hidden_size"]]] and changed["world"] == 8


def test_the_shipped_configurations_for_several_gpus_start(found: dict[str, Any]):
    assert found["shipped"] == {"llama-3.3-70b-4xh100": [4, 40], "qwq-32b-2x80g": [2, 40]}


def test_sizes_that_do_not_divide_are_refused(tiny_model: Path):
    with pytest.raises(
        ValidationError, match=r"size=3 does not divide the model's 4 attention heads\. What would work: 1, 2, 4\."
    ):
        LLM(tiny_model, tensor_parallel_size=3)


def test_a_started_jax_has_the_devices_that_it_has(tiny_model: Path):
    assert len(jax.devices()) == 1
    with pytest.raises(ValidationError, match=r"JAX has 1 of cpu\..*start Python with JAX_NUM_CPU_DEVICES=2"):
        LLM(tiny_model, tensor_parallel_size=2)


def test_the_null_model_has_nothing_to_split(tiny_model: Path):
    with pytest.raises(ValidationError, match="there is no model to split"):
        LLM(tiny_model, tensor_parallel_size=2, load_format="null")


def test_sums_over_devices_have_no_fixed_order(tiny_model: Path):
    with pytest.raises(ValidationError, match="deterministic=True with tensor_parallel_size=2"):
        LLM(tiny_model, tensor_parallel_size=2, deterministic=True)
