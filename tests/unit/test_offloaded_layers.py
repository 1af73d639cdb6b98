"""Which layers lie in the host's memory (`cpu_offload_gb`), what is planned for them, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.large_models import LLAMA_3_8B
from support.tiny_model import SMALL, write_tiny_model

import jaxllm
from jaxllm import LLM
from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.models.offloaded import fetch, lies_on_host, offloaded_layers
from jaxllm.parallel.host_memory import on_host
from jaxllm.planning import api
from jaxllm.runner.compile.target import target_here
from jaxllm.runner.memory.device_memory import host_copies
from jaxllm.startup.setup import read_setup

GIB = 2**30
#: of a layer, in bfloat16: queries, keys and values, what follows attention, the MLP, and two norms
LAYER_BYTES = 2 * ((32 + 2 * 8) * 128 * 4096 + 4096 * 4096 + 3 * 14336 * 4096 + 2 * 4096)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have one."""
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (9, ()),
        (10, (7,)),
        (25, (3, 7)),
        (30, (2, 5, 7)),
        (40, (1, 3, 5, 7)),
        (79, (1, 2, 3, 4, 5, 6, 7)),
        (1000, (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_layers_are_spread_evenly(most: int, wanted: tuple[int, ...]):
    assert offloaded_layers([10] * 8, most) == wanted


def test_larger_layers_count_as_what_they_are():
    """A first layer without experts is smaller than the others."""
    assert offloaded_layers([1, 10, 10, 10], 11) == (3,)
    assert offloaded_layers([1, 10, 10, 10], 20) == (1, 3)
    assert offloaded_layers([1, 10, 10, 10], 30) == (1, 2, 3)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_plan_has_them_in_the_machines_memory(llama: Path, devices: int):
    """4 GiB of each device, whole layers, as many as fit; on the device there is room for two of them."""
    plain, memory = (
        jaxllm.plan(llama, device="l4", tensor_parallel_size=devices, cpu_offload_gb=gib).memory for gib in (0, 4)
    )
    own = LAYER_BYTES // devices + (devices > 1) * 2 * 4096 * 2 // 2  # every device has the norms
    layers = min(4 * GIB // own, 32)
    assert memory.num_host_layers == layers
    assert memory.host_weight_bytes == layers * own <= 4 * GIB
    assert memory.weight_bytes == plain.weight_bytes - memory.host_weight_bytes
    assert memory.activation_bytes == plain.activation_bytes + 2 * own
    assert memory.num_tokens >= plain.num_tokens
    assert f"{layers * own / GIB:.3f} GiB  ({layers} layers, in the machine's memory; a step copies them)" in str(
        memory
    )
    assert f"{layers} layers, in the machine's memory" in memory._repr_html_()
    assert "host weights" not in str(plain)


def test_an_explanation_says_what_each_step_copies(llama: Path):
    """At the bandwidth of 16 lanes of PCI Express 4.0, 31.5 GB/s."""
    said = jaxllm.explain(llama, device="l4", cpu_offload_gb=4)
    layers = said.plan.memory.num_host_layers
    for step in said.steps:
        assert step.copied_bytes == layers * LAYER_BYTES
        assert step.copy_seconds == pytest.approx(layers * LAYER_BYTES / 31.5e9, rel=1e-3)
        assert step.seconds is not None and step.copy_seconds is not None and step.seconds >= step.copy_seconds
    here = sum(layout.device_bytes for layout in said.layouts if not layout.on_host and "KV" not in layout.name)
    assert here == said.plan.memory.weight_bytes
    assert "copies 3.656 GiB of them from the host's memory" in str(said)
    assert "in the host's memory" in str(said)
    assert type(said).from_dict(json.loads(json.dumps(said.to_dict()))) == said


def test_less_than_a_layer_is_refused(llama: Path):
    with pytest.raises(ValidationError, match=r"cpu_offload_gb=0\.1 holds no layer: one has 0\.406 GiB"):
        jaxllm.plan(llama, device="l4", cpu_offload_gb=0.1)
    assert jaxllm.plan(llama, device="l4", cpu_offload_gb=0.407).memory.num_host_layers == 1


def test_what_has_no_weights_is_refused(llama: Path):
    with pytest.raises(ValidationError, match='cpu_offload_gb=1 with load_format="null": there are no weights'):
        LLM(llama, load_format="null", cpu_offload_gb=1)
    with pytest.raises(ValidationError, match="cpu_offload_gb must be at least 0"):
        LLM(llama, cpu_offload_gb=-1)
    with pytest.raises(ValidationError, match="cpu_offload_params"):
        LLM(llama, cpu_offload_params={"qkv"})


def test_a_cpu_says_that_it_gains_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = write_tiny_model(tmp_path)
    with caplog.at_level(logging.INFO, logger="jaxllm"):
        setup = read_setup(engine_args(model, cpu_offload_gb="1MiB", **SMALL), model)
        config = setup.runner_config(target_here("cpu"), progress=None)
    assert "cpu_offload_gb=0.000976562 has no use on a CPU" in caplog.text
    assert "the weights of 2 of 2 layers" in caplog.text
    assert config.offloaded == (0, 1)


def test_arrays_know_where_they_lie():
    array = jnp.arange(6.0)
    assert not lies_on_host(array) and not lies_on_host(jax.ShapeDtypeStruct((2,), jnp.float32))
    moved = jax.device_put(array, on_host(DEVICE))
    assert lies_on_host({"weight": moved}) and on_host(moved.sharding) == moved.sharding
    assert lies_on_host(jax.ShapeDtypeStruct((2,), jnp.float32, sharding=on_host(DEVICE)))
    seen = []

    def traced(weights: Any, carry: Any) -> Any:
        seen.append(lies_on_host(weights))
        weights, carry = fetch(weights, carry)
        seen.append(lies_on_host(weights))
        return carry[0] + weights["weight"]

    np.testing.assert_array_equal(jax.jit(traced)({"weight": moved}, (array, array)), 2 * np.arange(6.0))
    assert seen == [True, False]


def test_what_sleeps_stays_where_it_is_on_the_host():
    weights = {"here": jnp.ones(3), "there": jax.device_put(jnp.ones(3), on_host(DEVICE))}
    kept = host_copies(weights)
    assert isinstance(kept["here"], np.ndarray) and kept["there"] is weights["there"]
