"""Quantized checkpoints: matrices come out of memory as the format's definition says, bit for bit, and products are
those of them.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.kept_kernels import KERNELS_FOLDER
from support.quantized_checkpoints import FORMATS, write
from support.stored_weights import F32, FIELDS, edited, load, specs_of
from support.tiny_model import CONFIG

from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear_f32
from jaxllm.layers.stacked_matrix import StackedMatrix
from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import device_bytes
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import SINGLE, TensorFiles
from jaxllm.weights.quantization.method import stream
from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.quant_matmul import cpu_ffi
from pallas_kernels.quantized import RoundedInputs, dense, power_of_two


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """The weights of a format's checkpoint, and those of the matrices that it stands for."""

    @functools.cache
    def loaded(name: str) -> tuple[Any, Any]:
        stored, plain = write(tmp_path_factory.mktemp("format"), name)
        return load(stored), load(plain)

    return loaded


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_are_what_the_format_says(both: Callable[[str], tuple[Any, Any]], name: str):
    ours, whole = both(name)
    for field in FIELDS:
        matrix = getattr(ours.layers[0], field)
        assert hasattr(matrix, "dequantize"), field
        np.testing.assert_array_equal(dense(matrix, F32), getattr(whole.layers[0], field), err_msg=field)
    np.testing.assert_array_equal(ours.head, whole.head)


@pytest.mark.parametrize(
    "name", ["awq", "gptq 8 bits", "gptq act-order", "fp8 blocks", "packed 4 bits", "nf4", "nvfp4", "mxfp8"]
)
def test_bytes_follow_from_the_config_alone(tmp_path: Path, name: str):
    stored, _ = write(tmp_path, name)
    planned = [specs_of(stored, load_format=kind)[1] for kind in ("dummy", "auto")]
    assert device_bytes(planned[0], F32, {}) == pytest.approx(device_bytes(planned[1], F32, {}), rel=0.02)
    (tmp_path / "config").mkdir()
    shutil.copy(stored / "config.json", tmp_path / "config")
    assert specs_of(tmp_path / "config")[1] == planned[0]
    drawn = load(stored, load_format="dummy")
    for field in FIELDS:
        numbers = np.asarray(dense(getattr(drawn.layers[0], field), F32))
        assert 0.01 < numbers.std() < 0.04, (field, numbers.std())


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_matrix(both: Callable[[str], tuple[Any, Any]], name: str, rows: int = 3):
    """Inputs that are rounded to eight bits, too, by the formula in numpy."""
    ours, whole = both(name)
    matrix = jax.tree.map(lambda array: np.asarray(array)[1], ours.layers[0].down)
    want = np.asarray(whole.layers[0].down[1])
    x = np.random.default_rng(1).standard_normal((rows, want.shape[1])).astype(np.float32)
    taken = x
    if isinstance(matrix, RoundedInputs):
        groups = x.reshape(rows, -1, matrix.group or x.shape[1])
        largest = 127 if matrix.dtype == "int8" else 448
        scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(largest)
        if matrix.scales is not None:
            scale = np.float32(0.02)
        scaled = np.clip(groups / scale, -largest, largest)
        rounded = np.rint(scaled) if matrix.dtype == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
        taken = (rounded.astype(np.float32) * scale).reshape(x.shape)
        assert np.abs(taken - x).max() > 1e-3
    y = jax.jit(linear_f32, static_argnums=0)(Context(), jnp.asarray(x), matrix)
    np.testing.assert_allclose(y, taken @ want.T, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gptq act-order", "fp8 static", "int8"])
def test_kernels_multiply_what_was_read(both: Callable[[str], tuple[Any, Any]], name: str):
    """As on a GPU, in the interpreter: the product is the one that the test above checks."""
    matrix = jax.tree.map(lambda array: np.asarray(array)[1], both(name)[0].layers[0].down)
    x = np.random.default_rng(1).standard_normal((3, matrix.shape[1])).astype(np.float16)
    kernels = Context(backend=Backend(implementation="triton", interpret=True))
    product = jax.jit(linear_f32, static_argnums=0)
    assert "pallas" in str(jax.make_jaxpr(linear_f32, static_argnums=0)(kernels, x, matrix))
    y, want = product(kernels, jnp.asarray(x), matrix), product(Context(), jnp.asarray(x, jnp.float32), matrix)
    # where a number of x is rounded to may differ between two programs
    assert y.dtype == F32 and np.linalg.norm(y - want) < 2e-3 * np.linalg.norm(want)


@pytest.mark.skipif(not cpu_ffi.forms(), reason="the processor has no products of bytes")
@pytest.mark.parametrize("name", ["int8", "quark int8"])
def test_a_cpu_kernel_multiplies_what_was_read(both: Callable[[str], tuple[Any, Any]], name: str):
    """In float32, as the test above, and of a stack, where it lies."""
    stack = jax.tree.map(np.asarray, both(name)[0].layers[0].down)
    matrix = jax.tree.map(lambda array: array[1], stack)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, matrix.shape[1])), jnp.float32)
    kernels = Context(backend=Backend(cpu_int8=cpu_ffi.load([matrix], "float32", KERNELS_FOLDER)))
    product = jax.jit(linear_f32, static_argnums=0)
    assert "ffi_call" in str(jax.make_jaxpr(linear_f32, static_argnums=0)(kernels, x, matrix))
    y, want = product(kernels, x, matrix), product(Context(), x, matrix)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(product(kernels, x, StackedMatrix(stack, jnp.int32(1))), y)


@given(bits=st.sampled_from((2, 3, 4, 8)), numbers=st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_streams_of_bits(bits: int, numbers: list[int]):
    numbers = [number & ((1 << bits) - 1) for number in numbers]
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    words = np.frombuffer(whole.to_bytes(-(-len(numbers) * bits // 32) * 4, "little"), np.int32)
    assert stream(words[None], bits, len(numbers))[0].tolist() == numbers


def test_exponents_are_powers_of_two():
    assert np.array_equal(power_of_two(jnp.arange(255, dtype=jnp.uint8)), 2.0 ** (np.arange(255.0) - 127))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_bitsandbytes_bytes_may_be_stored_as_numbers(tmp_path: Path, dtype: Any):
    """bnb_4bit_quant_storage, which FSDP wants."""
    stored, plain = write(tmp_path, "nf4")
    with TensorFiles(stored) as reader:
        changed = {
            name.removesuffix(".absmax"): reader.raw(name.removesuffix(".absmax")).copy().reshape(-1)
            for name in reader.names()
            if name.endswith(".absmax")
        }
    edited(stored, **{name: array.view(dtype).reshape(-1, 1) for name, array in changed.items()})
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)


def test_what_torch_saved_may_be_quantized(tmp_path: Path):
    torch = pytest.importorskip("torch")
    stored, plain = write(tmp_path, "awq")
    with TensorFiles(stored) as reader:
        tensors = {name: torch.from_numpy(reader.raw(name).copy()) for name in reader.names()}
    torch.save(tensors, stored / "pytorch_model.bin")
    whole = load(plain)
    np.testing.assert_array_equal(dense(load(stored, load_format="pt").layers[0].qkv, F32), whole.layers[0].qkv)
    (stored / "model.safetensors").unlink()
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), whole.layers[0].qkv)


GPT_OSS = {
    **CONFIG,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}


def test_mxfp4_experts_are_the_gguf_packages(tmp_path: Path):
    """A byte of HF's has neighbours, one of GGUF's numbers that are sixteen apart; what they stand for is the same."""
    random = np.random.default_rng(2)
    for kind in ("quantized", "dense"):
        (tmp_path / kind).mkdir()
        config = GPT_OSS | ({"quantization_config": {"quant_method": "mxfp4"}} if kind == "quantized" else {})
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
    tensors: dict[str, np.ndarray] = {}
    for spec in jax.tree.leaves(decoder_specs(model_config(GPT_OSS)), is_leaf=is_spec):
        for name, part in spec.tensors():
            tensors[name] = random.standard_normal(spec.tensor_shape(part)).astype(np.float32)
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        codes = random.integers(0, 16, (experts, rows, columns // 32, 32)).astype(np.uint8)
        exponents = random.integers(120, 128, codes.shape[:-1]).astype(np.uint8)
        stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{name}_scales"] = exponents
        blocks = np.concatenate([exponents[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
        matrix = gguf.quants.dequantize(blocks.reshape(experts * rows, -1), GGMLQuantizationType.MXFP4)
        tensors[name] = np.ascontiguousarray(matrix.reshape(experts, rows, columns).transpose(0, 2, 1))
    save_file(stored, tmp_path / "quantized" / "model.safetensors")
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    ours, whole = (load(tmp_path / kind).layers[0].sparse.experts for kind in ("quantized", "dense"))
    for field in ("gate_up", "down"):
        np.testing.assert_array_equal(dense(getattr(ours, field), F32), getattr(whole, field))
    assert sum(array.nbytes for array in jax.tree.leaves(ours.gate_up)) < whole.gate_up.nbytes / 7
    # with rows of three experts, and none of one
    x, sizes = jnp.asarray(random.standard_normal((6, 64)), F32), jnp.array([2, 0, 3, 1], jnp.int32)
    product = functools.partial(grouped_matmul, x, group_sizes=sizes, backend=Backend(), layer=jnp.int32(1))
    np.testing.assert_allclose(product(ours.gate_up), product(whole.gate_up), rtol=1e-5, atol=1e-5)
    # by the configuration alone
    _, planned = specs_of(tmp_path / "quantized", load_format="dummy")
    _, found = specs_of(tmp_path / "quantized")
    assert device_bytes(planned, F32, {}) == device_bytes(found, F32, {})
    name = next(name for name in stored if name.endswith("down_proj_scales"))
    with pytest.raises(WeightsError, match=rf"tensor '{name}' has shape \(8, 1\), .* it must be"):
        load(edited(tmp_path / "quantized", **{name: np.zeros((8, 1), np.uint8)}))
    with pytest.raises(WeightsError, match=f"no tensor '{name}'"):
        load(edited(tmp_path / "quantized", **{name: None}))


@pytest.mark.parametrize(
    "name",
    [
        "awq",
        "gptq 3 bits",
        "gptq act-order",
        "fp8 blocks",
        "int8",
        "packed 4 bits with zeros",
        "nf4",
        "bitsandbytes int8",
        "modelopt nvfp4",
    ],
)
def test_experts_and_latents_are_matrices_as_others(tmp_path: Path, name: str):
    """DeepSeek's, each expert's tensors by themselves; a router and what is left out stay as they are."""
    config, pack = FORMATS[name]
    model = {
        **CONFIG,
        "architectures": ["DeepseekV3ForCausalLM"],
        **{"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
        **{"moe_intermediate_size": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0},
    }
    random = np.random.default_rng(4)
    plain, stored = {}, {}
    for spec in jax.tree.leaves(decoder_specs(model_config(model)), is_leaf=is_spec):
        for tensor, part in spec.tensors():
            shape, module = spec.tensor_shape(part), tensor.removesuffix(".weight")
            if tensor in plain:
                continue
            if len(shape) == 2 and "proj" in module and "lm_head" not in module:
                ends, plain[tensor] = pack(*shape, random)
                stored.update({f"{module}.{end}": array for end, array in ends.items()})
            else:
                plain[tensor] = stored[tensor] = random.standard_normal(shape).astype(np.float32)
    for kind, tensors, extra in (("a", plain, {}), ("b", stored, {"quantization_config": config})):
        (tmp_path / kind).mkdir()
        as_written = {key: np.ascontiguousarray(np.asarray(value)) for key, value in tensors.items()}
        as_written = {k: v.astype(np.float32) if kind == "a" else v for k, v in as_written.items()}
        save_file(as_written, tmp_path / kind / "model.safetensors")
        (tmp_path / kind / "config.json").write_text(json.dumps(model | extra))
    whole, ours = (load(tmp_path / kind) for kind in "ab")
    sparse, latents = ours.layers[1].sparse, ours.layers[1].latents
    pairs = [
        *((getattr(sparse.experts, f), getattr(whole.layers[1].sparse.experts, f)) for f in ("gate_up", "down")),
        *((getattr(sparse, f), getattr(whole.layers[1].sparse, f)) for f in ("shared_gate_up", "shared_down")),
        *((getattr(latents, f), getattr(whole.layers[1].latents, f)) for f in ("down", "query_up", "up")),
    ]
    for matrix, want in pairs:
        assert not isinstance(matrix, jax.Array)
        np.testing.assert_array_equal(dense(matrix, F32), want)
    np.testing.assert_array_equal(sparse.router, whole.layers[1].sparse.router)


@pytest.mark.parametrize(
    ("architecture", "prefix", "fields"),
    [
        # experts that are called otherwise, in a model that sees images
        (
            "MixtralForCausalLM",
            "model.language_model.",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1},
        ),
        # queries, keys and values in one matrix, and in one by heads
        ("Phi3ForCausalLM", "model.", {"num_hidden_layers": 1}),
        ("GPTNeoXForCausalLM", "gpt_neox.", {"num_key_value_heads": None, "num_hidden_layers": 1}),
    ],
)
@pytest.mark.parametrize("name", ["awq", "modelopt nvfp4"])
def test_matrices_are_read_whatever_they_are_called(
    tmp_path: Path, architecture: str, prefix: str, fields: dict[str, Any], name: str
):
    (config, pack), random = FORMATS[name], np.random.default_rng(4)
    model = {key: value for key, value in {**CONFIG, "architectures": [architecture], **fields}.items() if value}
    plain, stored = {}, {}
    read = model_config(model)
    for spec in jax.tree.leaves(decoder_specs(read), is_leaf=is_spec):
        for tensor, part in spec.tensors():
            module = tensor.removesuffix(".weight").replace(read.names.prefix, prefix)
            if (
                tensor not in plain
                and ".layers." in tensor
                and len(part.tensor_shape) == 2
                and "gate" != tensor[-11:-7]
            ):
                ends, matrix = pack(*spec.tensor_shape(part), random)
                stored.update({f"{module}.{end}": array for end, array in ends.items()})
                plain[tensor] = matrix.astype(np.float32)
            elif tensor not in plain:
                plain[tensor] = random.standard_normal(spec.tensor_shape(part)).astype(np.float32)
                stored[tensor.replace(read.names.prefix, prefix)] = plain[tensor]

    def loaded(kind: str, tensors: dict[str, np.ndarray], own: dict[str, Any]) -> Any:
        (tmp_path / kind).mkdir()
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, tmp_path / kind / SINGLE)
        (tmp_path / kind / "config.json").write_text(json.dumps(model | own))
        return load(tmp_path / kind, prefix=read.names.prefix).layers

    ours, whole = loaded("b", stored, {"quantization_config": config}), loaded("a", plain, {})
    found = jax.tree.leaves(ours, is_leaf=lambda leaf: hasattr(leaf, "dequantize"))
    assert sum(hasattr(leaf, "dequantize") for leaf in found) == 4
    for one, other in zip(found, jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(dense(one, F32), other)
