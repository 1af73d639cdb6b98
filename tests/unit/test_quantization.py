"""Quantized checkpoints: matrices come out of memory as the format's definition says, bit for bit, and what is broken
is refused by its tensor.
"""

from __future__ import annotations

import functools
import json
import math
import re
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
from support.quantized_checkpoints import FORMATS, NF4, write
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm.api.errors import ValidationError
from jaxllm.config.quantization import NAMES
from jaxllm.layers.context import Context
from jaxllm.layers.embedding import embed, unembed
from jaxllm.layers.linear import PIECE, linear_f32
from jaxllm.layers.stacked_matrix import StackedMatrix, can_be_read, one_row_product
from jaxllm.layers.weight import is_spec
from jaxllm.layers.weight_storage import Int4Layout
from jaxllm.models.matrices import matrices, quantized
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import check_storage_split, device_bytes
from jaxllm.runner import adapter_stacks
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import SINGLE, TensorFiles
from jaxllm.weights.quantization.detect import ALIASES, METHODS, ONLINE, REFUSED, Quantization, quantization_method
from jaxllm.weights.quantization.kept import read_kept, write_kept
from jaxllm.weights.quantization.method import Found, stream
from jaxllm.weights.quantization.saved import SavedQuantization
from pallas_kernels.backend import Backend
from pallas_kernels.gguf_blocks import BLOCKS, BlockWeight
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import RoundedInputs, ScaledWeight, dense, index, power_of_two

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
FIELDS = ("qkv", "output", "gate_up", "down")
F32 = jnp.dtype(jnp.float32)


def specs_of(
    folder: Path, asked: str | None = None, load_format: str = "auto", prefix: str = "model."
) -> tuple[Checkpoint, Any]:
    checkpoint = Checkpoint(folder, load_format)
    specs = decoder_specs(model_config(checkpoint.config))
    checkpoint.quantize(asked, matrices(specs), prefix=prefix)
    if checkpoint.quantization is not None:
        specs = quantized(specs, checkpoint.quantization.layout)
    return checkpoint, specs


def load(folder: Path, asked: str | None = None, load_format: str = "auto") -> Any:
    checkpoint, specs = specs_of(folder, asked, load_format)
    checkpoint.check(specs)
    return checkpoint.load(specs, F32, DEVICE, seed=0, progress=False)


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


def test_experts_that_are_not_there_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert load(write_tiny_model(tmp_path), "experts_int8").layers[0].down.dtype == jnp.float32
    assert "quantization='experts_int8' has no effect" in caplog.text


@pytest.mark.parametrize("asked", ["int8", "experts_int8"])
def test_stacked_experts_are_quantized_while_they_are_read(tmp_path: Path, asked: str):
    """Granite's, of which a layer's gates and ups are one tensor, each row of every expert with a scale of its own."""
    config = {
        **CONFIG,
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "shared_intermediate_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    tensors = {
        name: draw.standard_normal(spec.tensor_shape(part)).astype(np.float32)
        for spec in jax.tree.leaves(decoder_specs(model_config(config)), is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    plain, ours = load(tmp_path).layers[0].sparse, load(tmp_path, asked).layers[0].sparse
    assert isinstance(ours.shared_down, ScaledWeight) == (asked == "int8")
    for name in ("gate_up", "down"):
        whole, matrix = getattr(plain.experts, name), getattr(ours.experts, name)
        assert matrix.values.dtype == jnp.int8 and matrix.shape == whole.shape
        step = np.abs(whole).max(axis=-1, keepdims=True) / 127
        assert (np.abs(np.asarray(dense(matrix, F32)) - whole) <= 0.501 * step).all()
    checkpoint, specs = specs_of(tmp_path, "int8")
    assert checkpoint.quantization is not None
    with pytest.raises(ValidationError, match=r"input_linear.weight has all experts of a layer.* format='orbax'"):
        SavedQuantization(checkpoint.quantization, specs)


@pytest.mark.parametrize("asked", ["int8", "fp8", "int4"])
def test_a_checkpoint_is_quantized_while_it_is_read(tmp_path: Path, asked: str):
    plain = write_tiny_model(tmp_path)
    ours, whole = load(plain, asked), load(plain)
    for field in FIELDS:
        matrix, want = getattr(ours.layers[0], field), np.asarray(getattr(whole.layers[0], field))
        step = {"int8": 1 / 254, "fp8": 1 / 16, "int4": 1 / 15}[asked]
        largest = np.abs(want).max(axis=-1, keepdims=True)
        error = np.abs(np.asarray(dense(matrix, F32)) - want)
        assert (error <= step * 1.01 * largest).all() and error.max() > 0, field


@pytest.mark.parametrize("asked", ["int8", "fp8", "int4", "bitsandbytes"])
@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "PhiForCausalLM"])
def test_heads_of_any_name_stay_as_they_are(tmp_path: Path, architecture: str, asked: str):
    config = {**CONFIG, "architectures": [architecture], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, specs = specs_of(tmp_path, asked, "dummy")
    assert is_spec(specs.head) and not is_spec(specs.layers[0].down)


def test_sixteen_bits_become_bitsandbytes_nearest_numbers(tmp_path: Path):
    """Of every 64 in a row the largest is kept, and of each number's share of it the nearest of NF4's (Dettmers et al.
    2023, arXiv:2305.14314, appendix E).
    """
    plain = write_tiny_model(tmp_path)
    ours, whole = load(plain, "bitsandbytes"), load(plain)
    for field in FIELDS:
        matrix, want = getattr(ours.layers[0], field), np.asarray(getattr(whole.layers[0], field))
        groups = want.reshape(*want.shape[:-1], -1, math.gcd(want.shape[-1], 64))
        largest = np.abs(groups).max(axis=-1, keepdims=True)
        nearest = NF4[np.abs(groups[..., None] / largest[..., None] - NF4).argmin(axis=-1)]
        np.testing.assert_allclose(
            dense(matrix, F32), (nearest * largest).reshape(want.shape), rtol=1e-6, err_msg=field
        )
    np.testing.assert_array_equal(ours.head, whole.head)


def test_one_matrix_may_be_left_out(tmp_path: Path):
    """Keys in 32 bits beside queries and values in four: the product is that of all three."""
    stored, plain = write(tmp_path, "packed 4 bits", left_out="k_proj")
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    one = jax.tree.map(lambda array: array[0], ours.layers[0].qkv)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    y = linear_f32(Context(), jnp.asarray(x), one)
    np.testing.assert_allclose(y, x @ np.asarray(whole.layers[0].qkv[0]).T, rtol=1e-5, atol=1e-5)


def test_layers_of_different_forms_are_segments(tmp_path: Path):
    stored, plain = write(tmp_path, "packed 4 bits", left_out="layers.1.mlp.down_proj")
    ours, whole = load(stored), load(plain)
    assert len(ours.layers) == 2
    for layer, segment in enumerate(ours.layers):
        np.testing.assert_array_equal(dense(segment.down, F32)[0], whole.layers[0].down[layer])


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


@given(bits=st.sampled_from((2, 3, 4, 8)), numbers=st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_streams_of_bits(bits: int, numbers: list[int]):
    numbers = [number & ((1 << bits) - 1) for number in numbers]
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    words = np.frombuffer(whole.to_bytes(-(-len(numbers) * bits // 32) * 4, "little"), np.int32)
    assert stream(words[None], bits, len(numbers))[0].tolist() == numbers


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_gguf_packages(kind: str):
    number = GGMLQuantizationType[kind]
    block, nbytes, _ = BLOCKS[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (block, nbytes)
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (3 * 4, nbytes), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for start in {**halves, "Q6_K": (208,), "MXFP4": ()}.get(kind, (0,)):
        raw[:, start : start + 2] = random.normal(0, 0.1, (12, 1)).astype("<f2").view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = random.integers(0, 150, 12)
    raw = raw.reshape(3, 4 * nbytes)
    ours = BlockWeight(data=jnp.asarray(raw), kind=kind)
    assert ours.shape == (3, 4 * block)
    theirs = gguf.quants.dequantize(raw, number)
    # a product and a sum, which a compiler may make one
    np.testing.assert_allclose(ours.dequantize(F32), theirs, rtol=1e-6, atol=1e-9)


def test_a_table_in_blocks_is_widened_in_pieces():
    """Two whole ones and a rest; rows of it are looked up."""
    random, size = np.random.default_rng(1), 2 * PIECE // 1024 + 37
    raw = gguf.quants.quantize(random.standard_normal((size, 1024), np.float32), GGMLQuantizationType.Q8_0)
    table = gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0)
    hidden = random.standard_normal((3, 1024), np.float32)
    stored = BlockWeight(data=jnp.asarray(raw), kind="Q8_0")
    scores = jax.jit(unembed, static_argnums=(0, 3))(Context(), jnp.asarray(hidden), stored, size)
    np.testing.assert_allclose(scores, hidden @ table.T, atol=1e-3)
    tokens = np.array([0, size - 1, 5, 5])
    np.testing.assert_array_equal(embed(Context(), stored, jnp.asarray(tokens), jnp.dtype("float32")), table[tokens])


def test_a_table_in_blocks_that_an_adapter_changes_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch):
    random, size, widened = np.random.default_rng(2), 2 * PIECE // 1024 + 37, []
    raw = gguf.quants.quantize(random.standard_normal((size, 1024), np.float32), GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(adapter_stacks, "dense", lambda part, dtype: widened.append(part.shape) or dense(part, dtype))
    found = adapter_stacks.whole_table(BlockWeight(data=jnp.asarray(raw), kind="Q8_0"), size - 5)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0)[: size - 5])
    assert set(widened) == {(PIECE // 1024, 1024)}


def test_exponents_are_powers_of_two():
    assert np.array_equal(power_of_two(jnp.arange(255, dtype=jnp.uint8)), 2.0 ** (np.arange(255.0) - 127))


def test_every_name_is_taken_or_refused_with_what_to_take():
    assert {*METHODS, *ALIASES, *ONLINE, *REFUSED, "gguf"} == set(NAMES)


def edited(folder: Path, **changes: Any) -> Path:
    """A checkpoint with other tensors; None: without one."""
    with TensorFiles(folder) as reader:
        tensors = {name: reader.raw(name).copy() for name in reader.names()}
    tensors.update({name: value for name, value in changes.items() if value is not None})
    save_file({n: v for n, v in tensors.items() if changes.get(n, v) is not None}, folder / "model.safetensors")
    return folder


Q = "model.layers.0.self_attn.q_proj"
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {f"{Q}.scales": None}, r"no tensor 'model.layers.0.self_attn.q_proj.scales'"),
    ("awq", {f"{Q}.qzeros": np.zeros((2, 7), np.int32)}, r"q_proj.qzeros' has shape \(2, 7\).*\[2, 8\]"),
    (
        "awq",
        {f"{Q}.scales": np.zeros((3, 64), np.float16), f"{Q}.qzeros": np.zeros((3, 8), np.int32)},
        "scales' has 3 groups, which do not divide .* 64 columns",
    ),
    ("gptq 4 bits", {f"{Q}.g_idx": np.zeros(64, np.int32)}, "g_idx' must give each of the 2 groups 32"),
    ("fp8 static", {f"{Q}.input_scale": None}, r"no tensor '.*q_proj.input_scale'"),
    ("fp8 blocks", {f"{Q}.weight_scale_inv": np.ones((1, 2), np.float32)}, r"weight_scale_inv' has shape \(1, 2\)"),
    ("packed 4 bits", {f"{Q}.weight_packed": np.zeros((64, 9), np.int32)}, "weight_packed' has 9 words a row.* 8"),
    ("int8", {f"{Q}.weight_scale": np.ones((63, 1), np.float32)}, r"weight_scale' has shape \(63, 1\)"),
    ("int8", {f"{Q}.weight": np.zeros((64, 64), np.uint8)}, "q_proj.weight' has type U8, and by its scheme it is I8"),
    ("packed 4 bits", {f"{Q}.weight_g_idx": np.zeros(64, np.int32)}, "weight_g_idx' must give each of the 2 groups 32"),
    ("nvfp4", {f"{Q}.weight_global_scale": None}, "no tensor '.*q_proj.weight_global_scale'"),
    ("nvfp4", {f"{Q}.weight_scale": np.zeros((64, 4), np.uint8)}, "weight_scale' has type U8, F8_E4M3 is known"),
    ("dense mxfp4", {f"{Q}.weight_scale": np.zeros((64, 3), np.uint8)}, r"weight_scale' has shape \(64, 3\)"),
    ("nf4", {f"{Q}.weight.quant_map": np.zeros(15, np.float32)}, r"quant_map' has shape \(15,\)"),
    ("bitsandbytes int8", {f"{Q}.SCB": np.zeros(3, np.float32)}, r"SCB' has shape \(3,\)"),
]


@pytest.mark.parametrize(("name", "change", "text"), BROKEN)
def test_broken_tensors_are_refused_by_name(tmp_path: Path, name: str, change: dict[str, Any], text: str):
    stored, _ = write(tmp_path, name)
    with pytest.raises(WeightsError, match=text):
        load(edited(stored, **change))


REFUSALS: list[tuple[str | None, dict[str, Any] | None, str]] = [
    ("gptq", {"quant_method": "awq"}, "'gptq', but the checkpoint is quantized by 'awq'"),
    ("int8", {"quant_method": "fp8"}, "'int8', but the checkpoint is quantized by 'fp8'"),
    ("awq", None, "'awq', but the checkpoint is not quantized.*'int8', 'fp8', 'int4'"),
    ("aqlm", None, "'aqlm' is not supported: take an AWQ"),
    ("gguf", None, "is no .gguf file"),
    (None, {"quant_method": "hqq"}, "quantized by 'hqq', which is not supported: take the model in 16 bits"),
    (None, {"quant_method": "new"}, "quantized by 'new', which is not supported: what can be read: awq"),
    (None, {"quant_method": "awq", "version": "GEMV"}, "version='gemv'; known are 'gemm'"),
    (None, {"quant_method": "awq", "checkpoint_format": "gemv_fast"}, "version='gemv_fast'; known are 'gemm'"),
    (None, {"quant_method": "gptq", "bits": 5}, "bits=5; known are 2, 3, 4, 8"),
    (
        None,
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        "checkpoint_format='marlin'; known are 'gptq'",
    ),
    (None, {"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24'; known are"),
    (
        None,
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse weights.*take a checkpoint of the same model without",
    ),
    (
        None,
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "has transforms of inputs.*take a checkpoint of the same model without",
    ),
    (None, {"quant_method": "exl2", "bits": 4.0}, "quantized by 'exl2', .*: take the model in 16 bits with"),
    (None, {"quant_method": "auto-round", "bits": 4, "data_type": "mx_int"}, "data_type='mx_int'; known are 'int'"),
    (None, {"quant_method": "auto-round", "bits": 8, "data_type": "fp8_e5m2", "fmt": "e5m2"}, "fmt='e5m2'; known are"),
    (
        None,
        {"quant_method": "auto-round", "bits": 8, "data_type": "fp", "group_size": 64},
        "group_size=64; known are -1",
    ),
    (None, {"quant_method": "auto-round", "bits": 4, "spinquant_config": {"r1": True}}, "rotations of inputs"),
    (
        "modelopt_fp4",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "'modelopt_fp4', but the .* by 'modelopt', FP8,",
    ),
    ("awq_marlin", {"quant_method": "gptq"}, "'awq_marlin', but the checkpoint is quantized by 'gptq'"),
    (
        None,
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8"},
        "packing_format='auto_round:fp8'; known",
    ),
    (
        None,
        {
            **{"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            **{"bits": 4, "extra_config": {"lm_head": {"bits": 8}}},
        },
        "8 bits in AWQ's layout, which has four: take .*'auto_round:auto_gptq'",
    ),
    (None, {"quant_method": "gptq", "dynamic": {"-:*k_proj": {}}}, r"'\*k_proj', which is no regular expression"),
    (None, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'; known are 'FP8'"),
    (
        None,
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}},
        "quant_algo of a='X'; known",
    ),
    (
        None,
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "uint8"}}},
        "dtype='uint8'; known are 'fp8_e4m3', 'int8', 'fp4'",
    ),
    (
        None,
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_channel"}}},
        "qscheme='per_channel'; known are 'per_group'",
    ),
    (None, {"quant_method": "quark", "export": {"weight_format": "fake_quantized"}}, "such weights are floats"),
    ("awq", {"quant_method": "quark"}, "'awq', but the checkpoint is quantized by 'quark'"),
]


@pytest.mark.parametrize(("asked", "config", "text"), REFUSALS)
def test_contradictions_are_refused_with_both_names(
    tmp_path: Path, asked: str | None, config: dict[str, Any] | None, text: str
):
    folder = write_tiny_model(tmp_path)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    with pytest.raises(ValidationError, match=text):
        specs_of(folder, asked)


def rewritten(folder: Path, **fields: Any) -> Path:
    """With other fields of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mlx_checkpoints_are_refused_by_name(tmp_path: Path):
    own = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization": own, "quantization_config": own}))
    with pytest.raises(ValidationError, match="quantized by 'mlx', which is not supported: take the model in 16 bits"):
        specs_of(tmp_path)


def test_modelopts_own_file_says_how_weights_are_stored(tmp_path: Path):
    """Also by modules that have the quantized ones in them."""
    stored, plain = write(tmp_path, "modelopt nvfp4")
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    layers = {f"model.layers.{i}.{part}": {"quant_algo": "NVFP4"} for i in range(2) for part in ("self_attn", "mlp")}
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (stored / "hf_quant_config.json").write_text(json.dumps(own))
    checkpoint, _ = specs_of(stored, load_format="dummy")
    assert checkpoint.quantization is None and checkpoint.kv_cache[0] == "fp8_e4m3"
    own["quantization"] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (stored / "hf_quant_config.json").write_text(json.dumps(own))
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].down, F32), whole.layers[0].down)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_rules_name_modules_as_the_checkpoint_does(tmp_path: Path, kind: str):
    """Of a model that sees images, whose text is ``model.language_model`` or ``language_model.model``."""
    if kind == "gptq":
        stored, plain = write(tmp_path, "gptq 4 bits")
        changes: dict[str, Any] = {
            "bits": 8,
            "dynamic": {r"+:model\.language_model\.layers\.\d+\.(self_attn|mlp)\..*": {"bits": 4}},
        }
    else:
        stored, plain = write(tmp_path, "packed 4 bits", left_out="k_proj")
        group = json.loads((stored / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        changes = {
            "config_groups": {"group_0": {**group, "targets": [r"re:language_model\.model\.layers\..*_proj$"]}},
            "ignore": ["re:.*lm_head", "language_model.model.layers.0.self_attn.k_proj", "re:.*1.self_attn.k_proj"],
        }
    rewritten(stored, **changes)
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_a_quantized_tower_is_refused_where_it_is_read(tmp_path: Path):
    stored, plain = write(tmp_path, "awq")
    tensors, _ = FORMATS["awq"][1](64, 64, np.random.default_rng(5))
    edited(stored, **{f"visual.blocks.0.mlp.up_proj.{end}": array for end, array in tensors.items()})
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)
    with pytest.raises(ValidationError, match=r"visual.blocks.0.mlp.up_proj.weight quantized.*limit_mm_per_prompt="):
        Checkpoint(stored).quantize(None, (), prefix="model.", sees=True)


def test_auto_rounds_expressions_leave_modules_out_in_awqs_layout_too(tmp_path: Path):
    stored, _ = write(tmp_path, "auto-round awq", left_out="k_proj")
    rewritten(stored, extra_config={".*k_proj.*": {"bits": 16}})
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_auto_round_says_which_modules_differ(tmp_path: Path):
    stored, plain = write(tmp_path, "auto-round", left_out="k_proj")
    rules = {
        "model.layers.0.self_attn.k_proj": {"bits": 16},
        r".*layers\.1\.self_attn\.k_": {"bits": 16, "data_type": "float"},
        "q_proj": {"bits": 4, "group_size": 32},
    }
    # by the rules alone
    rewritten(stored, bits=8, extra_config={**rules, ".*(v|o|gate|up|down)_proj": {"bits": 4}})
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


@pytest.mark.parametrize(
    ("name", "backend"), [("gptq v2", "auto_round:exllamav2"), ("gptq 4 bits", "auto_round:gptq:exllamav2")]
)
def test_older_auto_rounds_name_a_backend_in_the_packings_place(tmp_path: Path, name: str, backend: str):
    """Its own kernels' files have zero points as they are, GPTQ's less one."""
    stored, plain = write(tmp_path, name)
    rewritten(stored, quant_method="intel/auto-round", backend=backend)
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)


@pytest.mark.parametrize(
    ("coarse", "fine"), [("re:.*_proj$", None), ("re:.*self_attn.*", "re:.*_proj$"), ("Linear", "re:.*_proj$")]
)
def test_the_first_word_is_the_one_that_compressed_tensors_takes(tmp_path: Path, coarse: str, fine: str | None):
    """Names before expressions, these in the order of their text, classes last, whichever group is the first."""
    stored, _ = write(tmp_path, "packed 4 bits")
    group = json.loads((stored / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    modules = [name.removesuffix(".weight") for name in specs_of(stored)[0].quantization.matrices]  # pyright: ignore
    other = {**group, "weights": {**group["weights"], "num_bits": 8}, "targets": [coarse]}
    rewritten(stored, config_groups={"a": other, "b": {**group, "targets": modules if fine is None else [fine]}})
    checkpoint, specs = specs_of(stored)
    checkpoint.check(specs)


def test_quark_leaves_out_by_regular_expressions_too(tmp_path: Path):
    stored, _ = write(tmp_path, "quark mxfp4", left_out="k_proj")
    rewritten(stored, exclude=["lm_head", "re:model.layers.*.self_attn.k_proj"])
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


@pytest.mark.parametrize("kind", ["modelopt", "auto-round", "compressed-tensors"])
def test_rules_of_many_modules_are_compiled_once(monkeypatch: pytest.MonkeyPatch, kind: str):
    """`re` keeps 512 of them, and one more made each look-up of a module compile all of them."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(600)]
    group = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    config: dict[str, Any] = {
        "modelopt": {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": dict.fromkeys(names, {"quant_algo": "NVFP4"}),
            "exclude_modules": [f"{name}.none" for name in names],
        },
        "auto-round": {"extra_config": dict.fromkeys(names, {"bits": 8})},
        "compressed-tensors": {"config_groups": {"a": {**group, "targets": [f"re:{name}$" for name in names]}}},
    }[kind]
    method = METHODS[kind](config)
    compiled: list[str] = []
    compiler = re._compiler  # pyright: ignore[reportAttributeAccessIssue]
    own = compiler.compile
    monkeypatch.setattr(compiler, "compile", lambda pattern, *args: compiled.append(pattern) or own(pattern, *args))
    assert all(method.planned(f"{name}.weight", (64, 256)) is not None for name in names[-3:])
    assert not compiled


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


def test_heads_that_a_checkpoint_quantizes_stay_so(tmp_path: Path):
    stored, _ = write(tmp_path, "gptq 4 bits", changes={"tie_word_embeddings": False})
    tensors, matrix = FORMATS["gptq 4 bits"][1](CONFIG["vocab_size"], CONFIG["hidden_size"], np.random.default_rng(9))
    edited(stored, **{"lm_head.weight": None}, **{f"lm_head.{end}": array for end, array in tensors.items()})
    rewritten(stored, lm_head=True)
    head = load(stored).head
    assert not isinstance(head, jax.Array)
    np.testing.assert_array_equal(dense(head, F32), matrix)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_a_checkpoint_that_is_not_what_its_config_says(tmp_path: Path):
    folder = write_tiny_model(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeightsError, match="quantized by 'gptq', and no tensor's name ends in .qweight"):
        specs_of(folder)


def test_aliases_are_one_method(tmp_path: Path):
    stored, _ = write(tmp_path, "gptq 4 bits")
    _, wanted = specs_of(stored)
    for alias in ("gptq", "auto_gptq", "gptq_marlin"):
        _, specs = specs_of(stored, alias)
        assert jax.tree.leaves(specs, is_leaf=is_spec) == jax.tree.leaves(wanted, is_leaf=is_spec)


def test_an_integer_tensor_is_no_weight_by_itself(tmp_path: Path):
    folder = write_tiny_model(tmp_path)
    edited(folder, **{f"{Q}.weight": np.zeros((64, 64), np.int8)})
    with pytest.raises(WeightsError, match="type I8.*quantization_config"):
        load(folder)


@pytest.mark.parametrize(("asked", "columns"), [("int8", 64), ("int4", 64), ("int4", 128 * 75)])
def test_one_row_reads_the_stack_as_it_lies(asked: str, columns: int):
    """75 groups are more than a loop has terms."""
    random = np.random.default_rng(5)
    method, name, rows = ONLINE[asked](), "x.weight", 24
    found = Found(method.planned(name, (rows, columns)), (rows, columns))  # pyright: ignore[reportArgumentType]

    class Stored:
        def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
            return matrix

    layers = []
    for _ in range(3):
        matrix = random.standard_normal((rows, columns)).astype(np.float32)
        kinds = found.layout.shapes(rows, columns)
        arrays: Any = {kind: method.array(Stored(), name, found, kind, slice(None), None) for kind in kinds}  # pyright: ignore
        if asked == "int4":
            layers.append(Int4Weight(packed=arrays["packed"], scales=arrays["scales"].T, zeros=arrays["zeros"].T))
        else:
            layers.append(ScaledWeight(values=arrays["values"], scales=arrays["scales"]))
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    assert can_be_read(stack)
    x = random.standard_normal((1, columns)).astype(np.float32)
    for layer in range(3):
        y = jax.jit(one_row_product)(x, StackedMatrix(stack, jnp.int32(layer)))
        want = x @ np.asarray(dense(index(stack, jnp.int32(layer)), F32)).T
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.sqrt(columns))


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


def test_groups_that_devices_do_not_divide_are_refused(tmp_path: Path):
    """Four heads of 16 are one group of 64."""
    _, specs = specs_of(write_tiny_model(tmp_path), "int4")
    check_storage_split(specs, {"tensor": 1})
    with pytest.raises(ValidationError, match=r"4 devices do not divide the 1 groups of .*o_proj.weight.*: 1\."):
        check_storage_split(specs, {"tensor": 4})


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
        checkpoint, specs = specs_of(tmp_path / kind, prefix=read.names.prefix)
        checkpoint.check(specs, prefix=read.names.prefix)
        return checkpoint.load(specs, F32, DEVICE, prefix=read.names.prefix, seed=0, progress=False).layers

    ours, whole = loaded("b", stored, {"quantization_config": config}), loaded("a", plain, {})
    found = jax.tree.leaves(ours, is_leaf=lambda leaf: hasattr(leaf, "dequantize"))
    assert sum(hasattr(leaf, "dequantize") for leaf in found) == 4
    for one, other in zip(found, jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(dense(one, F32), other)


def test_experts_of_a_layer_that_differ_are_refused():
    model = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 1}
    form = Int4Layout(group=32, scale_dtype="float16")
    with pytest.raises(ValidationError, match="experts of layer 0 are quantized in different ways"):
        quantized(decoder_specs(model_config(model)), lambda name: form if "experts.0." in name else None)


@pytest.mark.parametrize("asked", ["int8", "tpu_int8", "experts_int8", "int4", "fp8", "bitsandbytes"])
def test_kept_matrices_are_asked_for_by_the_name_that_made_them(tmp_path: Path, asked: str):
    method = quantization_method(asked, None)
    assert method is not None
    made = Quantization(method, {"a.weight": Found(Int4Layout(group=32, scale_dtype="float16"), (4, 64))})
    write_kept(tmp_path, made)
    for name in (None, asked):
        kept = read_kept(tmp_path, name)
        assert kept is not None and kept.matrices == made.matrices
    with pytest.raises(ValidationError, match="quantization='awq', but the checkpoint is quantized by"):
        read_kept(tmp_path, "awq")
