"""A model in pipeline stages answers as the whole one does, keeps the laws in every stage, and is refused by name."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.offloading import assert_came_back
from support.own_process import found_by
from support.pairs import asked, assert_same_answer
from support.pipeline_parallel import COMMON, ENGINES, LAYERS

from jaxllm import LLM, Explanation
from jaxllm.api.errors import ValidationError
from jaxllm.planning.layout import KV_CACHE

STAGES = [name for name in ENGINES if name != "one"]
KINDS = [
    *("greedy", "seeded", "after prefix hits", "structured"),
    *("several", "penalties", "penalties after prefix hits"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What engines of several stages answered, in one process of their own."""
    return found_by("support.pipeline_parallel", tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", STAGES)
def test_tokens_are_those_of_one_device(found: dict[str, Any], stages: str, kind: str):
    assert found[stages][kind] == found["one"][kind]


@pytest.mark.parametrize("stages", STAGES)
def test_requests_were_preempted_and_found_their_prefix(found: dict[str, Any], stages: str):
    assert found[stages]["preemptions"] > 0 and found[stages]["prefix hits"] > 0


@pytest.mark.parametrize("kind", ["prompt logprobs", "logprobs"])
@pytest.mark.parametrize("stages", STAGES)
def test_log_probabilities_are_those_of_one_device(found: dict[str, Any], stages: str, kind: str):
    np.testing.assert_allclose(found[stages][kind], found["one"][kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stages", "layers", "devices"),
    [
        # as vLLM divides five layers
        ("4", [1, 1, 2, 1], [[0], [1], [2], [3]]),
        ("2 x 2", [3, 2], [[0, 1], [2, 3]]),
    ],
)
def test_every_stage_keeps_the_laws(found: dict[str, Any], stages: str, layers: list[int], devices: list[list[int]]):
    laws = found[stages]["laws"]
    assert laws["layers"] == layers and laws["devices"] == devices
    assert laws["copied"] == [0] * len(layers), "a stage copies its cache"
    assert laws["blocks"] == 0
    assert laws["plan"] == [len(layers), sum(map(len, devices))]
    assert not found[stages]["compiled"], "something was compiled after the start"


@pytest.mark.parametrize("stages", STAGES)
def test_what_leaves_the_devices_comes_back(found: dict[str, Any], stages: str):
    assert_came_back(found[stages]["offloaded"])
    assert found[stages]["offloaded"]["tokens"] == found["one"]["offloaded"]["tokens"]


@pytest.mark.parametrize("stages", STAGES)
def test_an_engine_explains_its_stages(found: dict[str, Any], stages: str):
    """Each device of a stage sums hidden states twice a layer; the first and the last stage exchange more."""
    said = Explanation.from_dict(found[stages]["explained"])
    layers, devices = found[stages]["laws"]["layers"], said.mesh["tensor"]
    assert said.mesh["stage"] == len(layers)
    for index, count in enumerate(layers):
        of_stage = [step for step in said.steps if step.stage == index]
        assert [step.tokens for step in of_stage] == [1, 4, COMMON["max_num_batched_tokens"]] and not any(
            step.not_compiled for step in of_stage
        )
        for step in of_stage:
            times: dict[str, int] = {}
            for exchange in step.exchanges:
                times[exchange.kind] = times.get(exchange.kind, 0) + exchange.times
            is_first, is_last = index == 0, index == len(layers) - 1
            expected = {"all-reduce": 2 * count + is_first, "all-gather": int(is_last)} if devices > 1 else {}
            expected["copy to the next stage"] = int(not is_last)
            assert times == {kind: number for kind, number in expected.items() if number}
        pages = [layout.shape[0] for layout in said.layouts if layout.stage == index and layout.name == KV_CACHE]
        assert pages == [count * COMMON["num_gpu_blocks_override"]]


@pytest.mark.parametrize("kind", ["sleep 1", "sleep 2", "own weights", "named weights", "trained weights", "saved"])
def test_weights_come_back(found: dict[str, Any], kind: str):
    assert found["changed"][kind] == found["one"]["greedy"]


def test_other_weights_are_used(found: dict[str, Any]):
    assert found["changed"]["other weights"] != found["one"]["greedy"]


@pytest.mark.parametrize("kind", asked())
def test_whatever_is_asked_of_stages_with_every_setting(found: dict[str, Any], kind: str):
    """Each option of a request, and each pair of them, beside preemption, prefix hits, chunks and `SETTINGS`."""
    mine, plain = (found[name]["asked"][kind] for name in ("4", "one"))
    assert_same_answer(mine, plain, kind)


def test_a_trace_shows_the_stages(found: dict[str, Any]):
    """Each has every step, in order, after the stage before; two of them work at once; the rest is the bubble."""
    trace = found["4"]["trace"]
    stages = [[record for record in trace["stages"] if record["stage"] == stage] for stage in range(4)]
    for own in stages:
        # one that nobody read of was launched behind the last request's end
        assert [record["step"] for record in own][: len(trace["steps"])] == trace["steps"]
        assert all(before["end"] <= after["start"] for before, after in itertools.pairwise(own))
    for first, second in itertools.pairwise(stages):
        assert all(early["end"] <= late["start"] for early, late in zip(first, second, strict=True))
    assert 0 <= trace["bubble"] < 1 and {"stage 1", "stage 4"} <= set(trace["drawn"])
    assert re.search(r"; 4 stages busy (\d+%, ){3}\d+% of the time\)$", trace["text"])


def test_groups_of_layers_across_stages_and_a_shared_matrix(found: dict[str, Any]):
    """Gemma 3 in a stage with a local layer, and one with a local and a global layer; read from safetensors."""
    (tokens, likely), (expected, expected_likely) = (found["hybrid"][name] for name in ("cut", "one"))
    assert tokens == expected
    np.testing.assert_allclose(likely, expected_likely, rtol=1e-4, atol=1e-4)


def test_more_stages_than_layers_are_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match=r"the model's 2 layers\. Set pipeline_parallel_size <= 2\."):
        LLM(tiny_model, pipeline_parallel_size=3)


@pytest.mark.parametrize("layers", ["2", "2,1", (1, 2), "1,1,1"])
def test_other_layers_are_refused(tiny_model: Path, layers: Any):
    with pytest.raises(ValidationError, match=r"the model's 2 layers need as many\. What would work: 1,1\."):
        LLM(tiny_model, pipeline_parallel_size=2, pipeline_layer_partition=layers)


def test_a_started_jax_has_the_devices_that_it_has(tiny_model: Path):
    assert len(jax.devices()) == 1
    with pytest.raises(ValidationError, match=r"pipeline_parallel_size=2 needs as many devices; JAX has 1 of cpu\."):
        LLM(tiny_model, pipeline_parallel_size=2)
    with pytest.raises(ValidationError, match=r"pipeline_parallel_size=2 x tensor_parallel_size=2 needs 4 devices"):
        LLM(tiny_model, tensor_parallel_size=2, pipeline_parallel_size=2)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_decode_steps": 4}, r"num_decode_steps=4: .*Set num_decode_steps=1, or pipeline_parallel_size=1\."),
        ({"runner": "pooling", "convert": "embed"}, "only available for models that generate"),
        ({"load_format": "null"}, "there is no model to split"),
    ],
)
def test_what_has_no_stages_is_refused(tiny_model: Path, arguments: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        LLM(tiny_model, pipeline_parallel_size=2, **arguments)


def test_stages_are_as_vllm_divides_layers():
    """Its documentation's example of 61 layers, and its rule that the last stage gets no layer that is left over."""
    from jaxllm.parallel.stages import pipeline

    def sizes(layers: int, count: int) -> list[int]:
        return [stage.num_layers for stage in pipeline(layers, count)]

    assert sizes(61, 2) == [31, 30] and sizes(61, 4) == [15, 15, 16, 15]
    assert sizes(LAYERS, 4) == [1, 1, 2, 1] and sizes(7, 4) == [2, 2, 2, 1] and sizes(2, 2) == [1, 1]
    assert pipeline(5, 1) == ()
