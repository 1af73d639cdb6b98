"""What the KV cache may be stored as, what a checkpoint says of it, and how many bytes it takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from support.tiny_model import CONFIG

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.config.quantization import KV_CACHE_DTYPES
from jaxllm.planning import api
from jaxllm.weights.quantization.kv_cache import wanted_kv_cache
from pallas_kernels.backend import Backend

LLAMA = {**CONFIG, "head_dim": 80, "num_hidden_layers": 3, "torch_dtype": "bfloat16"}
#: what the keys and the values of a token are
NUMBERS, VECTORS = 3 * 2 * 2 * 80, 3 * 2 * 2


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have one."""
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)


def write(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    return folder


def test_vllms_names():
    names = {
        "auto": "auto",
        "FP8": "fp8_e4m3",
        "fp8_per_token_head": "fp8_e4m3",
        "int8_per_token_head": "int8",
        "half": "float16",
        **{name: name for name in KV_CACHE_DTYPES},
    }
    assert {name: engine_args("m", kv_cache_dtype=name).kv_cache_dtype for name in names} == names


@pytest.mark.parametrize("name", ["nvfp4", "int4_per_token_head", "turboquant_4bit_nc"])
def test_fewer_bits_are_refused_with_what_to_take(name: str):
    with pytest.raises(ValidationError, match=f"kv_cache_dtype='{name}' is not supported.*Take 'int8' or 'fp8'"):
        engine_args("m", kv_cache_dtype=name)


def test_other_names_are_refused_with_those_that_there_are():
    with pytest.raises(ValidationError, match="kv_cache_dtype must be one of auto, float32, .*got 'fp8_ds_mla'"):
        engine_args("m", kv_cache_dtype="fp8_ds_mla")


def test_scales_are_always_computed(caplog: pytest.LogCaptureFixture):
    engine_args("m", calculate_kv_scales=True)
    assert "calculate_kv_scales (every key and value of a quantized KV cache has a scale of its own)" in caplog.text


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ("auto", 2 * NUMBERS),
        ("float32", 4 * NUMBERS),
        ("float16", 2 * NUMBERS),
        ("int8", NUMBERS + 4 * VECTORS),
        ("fp8", NUMBERS + 4 * VECTORS),
    ],
)
def test_bytes_are_planned(tmp_path: Path, asked: str, size: int):
    explained = jaxllm.explain(write(tmp_path), device="h200", kv_cache_dtype=asked, tensor_parallel_size=2)
    memory = explained.plan.memory
    # of one of two devices
    assert memory.kv_bytes_per_token == size // 2
    cache = [layout for layout in explained.layouts if layout.name.startswith("KV cache")]
    assert sum(layout.device_bytes for layout in cache) == memory.kv_cache_bytes
    assert memory.kv_cache_bytes == memory.num_blocks * 16 * size // 2
    stored = {"auto": "bfloat16", "fp8": "float8_e4m3fn"}.get(asked, asked)
    assert [layout.dtype for layout in cache] == [stored, "float32"][: len(cache)]
    assert len(cache) == (2 if asked in ("int8", "fp8") else 1)


def test_pages_between_2_and_4_gib_of_one_byte_are_not_planned(tmp_path: Path):
    """The kernels cannot address them."""
    folder, block = write(tmp_path), 16 * NUMBERS
    few, many = 2**31 // block, 2**32 // block + 1

    def plan(**arguments: Any) -> Any:
        return jaxllm.plan(folder, device="h200", **{"kv_cache_dtype": "int8", **arguments})

    assert plan(num_gpu_blocks_override=few).fits and plan(num_gpu_blocks_override=many).fits
    for number in (few + 1, many - 1):
        refused = plan(num_gpu_blocks_override=number)
        assert not refused.fits and "kernels cannot address" in refused.problem
        assert (refused.remedies[0].argument, refused.remedies[0].value) == ("num_gpu_blocks_override", few)
        assert plan(num_gpu_blocks_override=number, kv_cache_dtype="float16").fits
    # 3 GiB are left
    memory = plan(num_gpu_blocks_override=few).memory
    share = (memory.used_bytes + 2**30) / memory.total_bytes
    found = plan(gpu_memory_utilization=share, max_num_seqs=10_000).memory
    assert found.num_blocks == few and "kernels cannot address" in found.unused_why


def test_latents_have_a_scale_each(tmp_path: Path):
    latents = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": 3,
    }
    folder = write(tmp_path, **latents)
    for dtype, size in (("float32", 64 * 4), ("int8", 64 + 4), ("fp8", 64 + 4)):
        explained = jaxllm.explain(folder, device="h200", kv_cache_dtype=dtype, tensor_parallel_size=2)
        memory = explained.plan.memory
        # every device has all of them
        assert memory.kv_bytes_per_token == 3 * size
        cache = [layout for layout in explained.layouts if layout.name.startswith("KV cache")]
        assert sum(layout.device_bytes for layout in cache) == memory.kv_cache_bytes


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, None),
        ({"kv_cache_scheme": None}, None),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}, "fp8_e4m3"),
        ({"kv_cache_scheme": {"type": "int", "num_bits": 8}}, "int8"),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 4}}, None),
        ({"kv_cache_scheme": "static"}, "fp8_e4m3"),
        ({"kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
        ({"kv_cache_quant_algo": "NVFP4"}, None),
        (
            {
                "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
                "layer_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}},
            },
            "fp8_e4m3",
        ),
        (
            {
                "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
                "layer_quant_config": {"model.layers.0.self_attn.v_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}},
            },
            "fp8_e4m3",
        ),
        ({"export": {"kv_cache_group": []}, "layer_quant_config": {"*k_proj": {"output_tensors": None}}}, None),
        ({"kv_cache_dtype": "auto"}, None),
    ],
)
def test_what_a_checkpoint_says(said: dict[str, Any], wanted: str | None):
    assert wanted_kv_cache(said)[0] == wanted


@pytest.mark.parametrize(("algorithm", "width"), [("FP8", 1), ("NVFP4", 2)])
def test_what_a_checkpoint_says_is_done_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, algorithm: str, width: int
):
    caplog.set_level(logging.INFO)
    said = {"quantization": {"kv_cache_quant_algo": algorithm}}
    (write(tmp_path) / "hf_quant_config.json").write_text(json.dumps(said))
    memory = jaxllm.plan(tmp_path, device="h200").memory
    assert memory.kv_bytes_per_token == width * NUMBERS + (4 * VECTORS if width == 1 else 0)
    told = {1: "the KV cache is float8_e4m3fn, with a scale", 2: "its KV cache is bfloat16"}[width]
    assert f"kv_cache_quant_algo='{algorithm}'" in caplog.text and told in caplog.text
    # who asks for something gets it
    assert jaxllm.plan(tmp_path, device="h200", kv_cache_dtype="bfloat16").memory.kv_bytes_per_token == 2 * NUMBERS


def test_a_gpu_without_casts_keeps_the_bits():
    """Of e4m3, which Ampere has no casts of: its pages are written and read by XLA, as on a CPU."""
    ampere, ada = (Backend(implementation="triton", compute_capability=version) for version in ((8, 0), (8, 9)))
    assert not ampere.supports(jnp.dtype(jnp.float8_e4m3fn)) and ada.supports(jnp.dtype(jnp.float8_e4m3fn))
    assert not ada.supports(jnp.dtype(jnp.uint8)) and ampere.supports(jnp.dtype(jnp.int8))
