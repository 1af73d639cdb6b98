"""GPT-OSS through the whole engine: over four devices, two of which have a stage, it answers as transformers does, of
which the KV cache is in int8, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.own_process import found_by
from support.pairs import BUDGET
from support.sinks import GPT_OSS, KV_CACHE_DTYPE
from support.tensor_parallel import GREEDY, PROMPTS
from support.ways import transformers_greedy

from jaxllm.parallel.stages import pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sinks")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What an engine over several devices answered, in a process of its own."""
    return found_by("support.sinks", folder)


def test_tokens_are_those_of_transformers(found: dict[str, Any], folder: Path):
    """Of what was read, and of what was saved from the devices."""
    assert GREEDY.max_tokens is not None
    expected = transformers_greedy(folder / "saved", PROMPTS, GREEDY.max_tokens, kv_cache_dtype=KV_CACHE_DTYPE)
    read = transformers_greedy(folder / "model", PROMPTS, GREEDY.max_tokens, kv_cache_dtype=KV_CACHE_DTYPE)
    assert found["greedy"] == expected == read
    # not those of keys and values as they are
    assert expected != transformers_greedy(folder / "model", PROMPTS, GREEDY.max_tokens)
    # of each stage, on each of its devices
    assert len(found["cache"]) == 4 and sum(found["cache"]) == 2 * found["planned"]
    assert found["preemptions"] > 0 and found["prefix hits"] > 0
    assert found["after prefix hits"] == [expected[2]]
    ways = found["ways"]
    assert ways["texts"] == ways["vectors"] == ways["sleep 1"] == ways["sleep 2"] == [ids[:8] for ids in expected]


def test_streams_are_what_is_generated(found: dict[str, Any]):
    ways = found["ways"]
    for kind, streamed in ways["streamed"].items():
        assert streamed.items() <= {**ways["asked"][kind]}.items(), kind
    assert len(ways["asked"]["thinking budget"]["text"][0].partition(")")[0]) <= BUDGET
    assert all(len(sequences) == 3 for sequences in (*ways["several"], *ways["beams"]))


def test_the_load_of_experts_in_both_stages(found: dict[str, Any]):
    """Every token goes to as many experts of each layer, a stage; what a preemption lost is computed anew."""
    layers = GPT_OSS["num_hidden_layers"]
    assert [stage.num_layers for stage in pipeline(layers, 2)] == [1, 1]
    load = found["load"]
    tokens = sum(map(len, PROMPTS)) + sum(len(ids) - 1 for ids in load["tokens"])
    (counted,) = {sum(counts) for counts in load["trace"]}
    assert len(load["trace"]) == layers and counted >= GPT_OSS["num_experts_per_tok"] * tokens
    assert counted % GPT_OSS["num_experts_per_tok"] == 0
    assert load["metrics"] == {str(layer): counts for layer, counts in enumerate(load["trace"])}
