"""What attention is compiled to, by what was asked for, the device and the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.runner.compile.attention_backend import attention_backend


@dataclasses.dataclass(frozen=True)
class Device:
    """What of a GPU the choice depends on."""

    compute_capability: str
    device_kind: str = "NVIDIA Test"
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a model it depends on: Llama-3.1-8B's."""

    head_dim: int = 128
    num_heads: int = 32
    num_kv_heads: int = 8


def choose(asked: str, device: Any, *, model: Model = Model(), dtype: str = "bfloat16", block_size: int = 16) -> str:
    return attention_backend(asked, device, model, dtype, block_size).implementation  # pyright: ignore


def test_what_is_asked_for_is_taken_where_it_runs():
    hopper, blackwell, turing = Device("9.0"), Device("10.0"), Device("7.5")
    assert [choose("auto", device) for device in (hopper, blackwell, turing)] == ["triton", "triton", "xla"]
    assert choose("xla", hopper) == "xla"
    assert choose("triton", blackwell) == "triton"
    assert choose("mosaic", hopper) == "mosaic"


@pytest.mark.parametrize("device", [Device("8.0"), Device("10.0"), jax.devices("cpu")[0]], ids=str)
def test_mosaic_is_refused_without_hopper(device: Any):
    with pytest.raises(ValidationError, match=r"attention_backend='mosaic' needs .* 9.0 \(Hopper\)"):
        choose("mosaic", device)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float32"), "not both bfloat16 or both float16"),
        (dict(block_size=48), "block_size 48"),
        (dict(model=Model(head_dim=80)), "head_dim 80 is none of"),
        (dict(model=Model(num_heads=200, num_kv_heads=1)), "200 heads share a key"),
    ],
)
def test_models_that_mosaic_does_not_take_are_refused(change: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=f"'mosaic' is not for this model: .*{reason}"):
        choose("mosaic", Device("9.0"), **change)
