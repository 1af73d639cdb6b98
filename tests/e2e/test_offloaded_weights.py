"""Engines with layers whose weights lie in the host's memory answer as those that have all on the device, whatever
becomes of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.models.offloaded import lies_on_host
from jaxllm.models.segments import resegment, segment_sizes
from jaxllm.weights.checkpoint import Checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["one", "two and two", "a longer line that fills more than one block of the cache"]


def answers(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def params_of(llm: LLM) -> Any:
    [params] = llm.apply_model(lambda params: params)
    return params


@pytest.fixture(scope="module")
def offloading(engine: LLM, tiny_model: Path) -> Iterator[LLM]:
    """One of the two layers lies on the host."""
    layers = sum(array.nbytes for array in jax.tree.leaves(params_of(engine).layers))
    with LLM(tiny_model, **SMALL, cpu_offload_gb=f"{layers * 3 // 4}B") as llm:
        yield llm


def test_it_answers_as_without(engine: LLM, offloading: LLM):
    assert answers(offloading) == answers(engine)
    params, plan = params_of(offloading), offloading.memory_plan
    assert segment_sizes(params) == (1, 1)
    assert [lies_on_host(segment) for segment in params.layers] == [False, True]
    assert plan.host_weight_bytes == sum(array.nbytes for array in jax.tree.leaves(params.layers[1]))
    assert plan.weight_bytes + plan.host_weight_bytes == engine.memory_plan.weight_bytes


def test_it_sleeps_and_wakes(offloading: LLM):
    before = answers(offloading)
    for level in (1, 2):
        offloading.sleep(level)
        offloading.wake_up()
        assert answers(offloading) == before
        assert [lies_on_host(segment) for segment in params_of(offloading).layers] == [False, True]


def test_it_takes_other_weights(offloading: LLM):
    """In any segments, from wherever they lie."""
    before, params = answers(offloading), params_of(offloading)
    elsewhere = jax.tree.map(np.asarray, params)
    offloading.update_weights(jax.tree.map(np.negative, elsewhere))
    assert answers(offloading) != before
    offloading.update_weights(resegment(elsewhere, (2,)))
    assert answers(offloading) == before
    assert [lies_on_host(segment) for segment in params_of(offloading).layers] == [False, True]
    offloading.update_weights(params)
    assert answers(offloading) == before


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_it_is_saved_whole(engine: LLM, offloading: LLM, tmp_path: Path, form: str):
    offloading.save(tmp_path / "saved", format=form)
    engine.save(tmp_path / "plain", format=form)
    config: Any = engine.engine.model_files.config
    saved, plain = (
        Checkpoint(tmp_path / name).load(
            config.specs(), np.dtype("float32"), config.sharding, prefix="", seed=0, progress=False
        )
        for name in ("saved", "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, saved, plain)
