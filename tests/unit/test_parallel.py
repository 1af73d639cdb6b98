"""A model split over devices: the same numbers, the shapes of its parts, and what the devices exchange."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.split_families import FAMILIES
from support.tiny_model import CONFIG

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPUS
from jaxllm.config.parallel import Grid
from jaxllm.layers.weight import Axis
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.collectives import (
    Collective,
    collective_bytes,
    collectives,
    count_collectives,
    expected_collectives,
)
from jaxllm.parallel.mesh import DATA, TENSOR
from jaxllm.parallel.rules import check_split, device_bytes, held, split_sizes
from jaxllm.runner.compile.target import target_described

MODEL = model_config(CONFIG)
HLO = """\
HloModule jit_step

%body.1 (arg.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg.1 = (s32[], f32[8,4]) parameter(0)
  %sum.1 = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add.1, metadata={op_name="f/over_mlp/psum"}
  %sum.2 = f32[8,4]{1,0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%add.1
  %sum.3 = f32[8,4]{1,0} all-reduce-done(%sum.2)
  ROOT %tuple.1 = (s32[], f32[8,4]) tuple(%i, %sum.3)
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.2 = f32[] add(%a, %b)
}

%unknown.1 (arg.2: (s32[])) -> (s32[]) {
  ROOT %g = (s32[]) all-gather(%z), dimensions={0}
}

ENTRY %main.9 (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0), metadata={op_name="not an all-reduce(x)"}
  %w.1 = (s32[], f32[8,4]) while(%t), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %w.2 = (s32[]) while(%t2), condition=%c.2, body=%unknown.1
  %once = f32[8,4]{1,0} all-reduce(%p), to_apply=%add.1
  ROOT %f = f32[8,4]{1,0} fusion(%once), kind=kLoop, calls=%add.1
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert count_collectives(HLO) == {"all-reduce": 2 * 7 + 1, "all-gather": 1}
    assert count_collectives("") == {}


def test_collectives_are_told_apart():
    gathers = """\
%few (a: f32[2]) -> f32[4] {
  ROOT %g = f32[4] all-gather(%a), replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/over_vocab/all_gather"}
}

%many (a: f32[2]) -> f32[4] {
  %g = f32[4] all-gather(%a), replica_groups={}
  ROOT %h = bf16[4] reduce-scatter(%g), replica_groups={{0,2,4},{1,3,5}}
}

ENTRY %main (a: f32[2]) -> f32[4] {
  %c = f32[4] conditional(%i, %a, %a), branch_computations={%few, %many}
  ROOT %d = f32[4] conditional(%i, %a), branch_computations={%few}
}
"""
    many = {Collective("all-gather", 16, 0, ""): 1, Collective("reduce-scatter", 8, 3, ""): 1}
    assert collectives(gathers) == {**many, Collective("all-gather", 16, 4, "vocab"): 1}
    assert collectives(HLO)[Collective("all-reduce", 128, 2, "mlp")] == 7
    assert collective_bytes(HLO)["all-reduce"] == (2 * 7 + 1) * 128


def test_one_device_exchanges_nothing():
    assert expected_collectives(7, 1) == {}


def test_replicas_that_share_experts_exchange_tokens():
    """A layer's are gathered and its sums scattered; which tokens there are is known to all, once."""
    assert expected_collectives(7, 1, exchanging=5) == {"all-gather": 6, "reduce-scatter": 5}
    assert expected_collectives(7, 2, exchanging=5) == {"all-reduce": 15, "all-gather": 7, "reduce-scatter": 5}


@given(experts=st.integers(1, 8), data=st.integers(1, 4), tensor=st.integers(1, 4))
def test_experts_are_spread_over_replicas_and_their_devices(experts: int, data: int, tensor: int):
    """Oracle: the experts in equal parts, one device of a replica after the other."""
    sizes, axis = {DATA: data, TENSOR: tensor}, Axis("experts", experts * data * tensor)
    numbers = [{DATA: replica, TENSOR: device} for replica in range(data) for device in range(tensor)]
    for part, number in zip(np.split(np.arange(axis.units), data * tensor), numbers, strict=True):
        own = held(axis, sizes, number)
        assert part.tolist() == list(range(own.first, own.first + own.count))


@given(words=st.integers(1, 100), devices=st.integers(1, 16))
def test_a_vocabulary_is_filled_up(words: int, devices: int):
    """Oracle: the vocabulary filled up to a multiple, and cut."""
    rows = -(-words // devices) * devices
    padded = np.where(np.arange(rows) < words, np.arange(rows), -1)
    for device, part in enumerate(np.split(padded, devices)):
        own = held(Axis("vocab", words), {TENSOR: devices}, {TENSOR: device})
        assert own.size == len(part)
        np.testing.assert_array_equal(np.arange(own.first, own.first + own.count), part[part >= 0])


def test_the_devices_are_replicas_of_stages():
    """On the axes data, stage and tensor, outermost first."""
    names = [f"d{number}" for number in range(12)]
    target = target_described(GPUS["h100"], names, grid=Grid(data=2, stage=3, tensor=2))
    assert target.device == "d0" and target.grid.size == 12
    replica = target.replica(1)
    assert (replica.device, replica.grid) == ("d6", (1, 3, 2))
    stage = replica.stage(2)
    assert stage.devices is not None and stage.devices.tolist() == [[["d10", "d11"]]]
    assert stage.device == "d10" and stage.mesh_sizes == {TENSOR: 2}
    together = target_described(GPUS["h100"], names[:6], grid=Grid(data=3, tensor=2))
    assert together.replicas == 3 and together.mesh_sizes == {DATA: 3, TENSOR: 2}
    nothing = target_described(GPUS["h100"], grid=Grid(data=2, tensor=4)).replica(1)
    assert nothing.grid == (1, 1, 4) and nothing.sharding is None


heads = st.integers(1, 64)


@given(kv_heads=heads, group=st.integers(1, 8), intermediate=st.integers(1, 64), devices=st.integers(1, 64))
def test_a_split_is_whole_or_refused(kv_heads: int, group: int, intermediate: int, devices: int):
    """Oracle: every device has the same whole number of query heads, and all of them read one KV head or more."""
    model = dataclasses.replace(
        MODEL, num_heads=kv_heads * group, num_kv_heads=kv_heads, intermediate_size=intermediate
    )
    queries = [range(d * model.num_heads // devices, (d + 1) * model.num_heads // devices) for d in range(devices)]
    even = len({len(part) for part in queries}) == 1 and len(queries[0]) > 0
    read = [{query // group for query in part} for part in queries]
    # a device holds whole KV heads for its own queries, or shares one with its neighbours
    whole = all(len(part) == group * len(kv) for part, kv in zip(queries, read, strict=True))
    shared = all(len(kv) == 1 for kv in read)
    if even and (whole or shared) and intermediate % devices == 0:
        check_split(model, devices)
        assert devices in split_sizes(model)
        layers, float32 = decoder_specs(model).layers, jnp.dtype("float32")
        assert device_bytes(layers, float32, {}) <= devices * device_bytes(layers, float32, {TENSOR: devices})
        numbers = [{TENSOR: device} for device in range(devices)]
        for axis, parts in ((Axis("heads", model.num_heads), queries), (Axis("kv_heads", kv_heads), read)):
            found = [held(axis, {TENSOR: devices}, number) for number in numbers]
            assert [set(range(own.first, own.first + own.count)) for own in found] == [set(part) for part in parts]
            assert {own.size for own in found} == {len(set(parts[0]))}
    else:
        with pytest.raises(ValidationError, match=r"What would work: 1"):
            check_split(model, devices)


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("split_model.py", ["2 2", "4 2", "2 1 1"]),
        pytest.param("split_families.py", list(FAMILIES), marks=pytest.mark.thorough),
    ],
)
def test_a_split_computes_what_the_whole_does(script: str, printed: list[str]):
    """In a process of its own, which has more than one device."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == printed
