"""Weights of 16 or 32 bits that are quantized while they are read, and the matrices of them that are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.quantized_checkpoints import NF4
from support.stored_weights import F32, FIELDS, load, specs_of
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm.api.errors import ValidationError
from jaxllm.layers.stacked_matrix import StackedMatrix, can_be_read, one_row_product
from jaxllm.layers.weight import is_spec
from jaxllm.layers.weight_storage import Int4Layout
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import check_storage_split
from jaxllm.weights.quantization.detect import ONLINE, Quantization, quantization_method
from jaxllm.weights.quantization.kept import read_kept, write_kept
from jaxllm.weights.quantization.method import Found
from jaxllm.weights.quantization.saved import SavedQuantization
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import ScaledWeight, dense, index


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


def test_groups_that_devices_do_not_divide_are_refused(tmp_path: Path):
    """Four heads of 16 are one group of 64."""
    _, specs = specs_of(write_tiny_model(tmp_path), "int4")
    check_storage_split(specs, {"tensor": 1})
    with pytest.raises(ValidationError, match=r"4 devices do not divide the 1 groups of .*o_proj.weight.*: 1\."):
        check_storage_split(specs, {"tensor": 4})


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
