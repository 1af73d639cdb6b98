"""Dequantisation against the ``gguf`` package (an independent implementation) and against blocks computed by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import gguf_quants
from jaxllm.weights.formats.gguf_header import parse_header
from jaxllm.weights.formats.gguf_quants import TENSOR_TYPE_BY_NAME, TENSOR_TYPES, dequantize_rows

QUANTISED = [name for name, kind in TENSOR_TYPE_BY_NAME.items() if kind.unpack and not kind.package]
BY_PACKAGE = [name for name, kind in TENSOR_TYPE_BY_NAME.items() if kind.package]
# Byte offsets of the float16 fields of each block.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
}


def random_rows(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes everywhere but in the float16 fields, which get values a model could have."""
    rng = np.random.default_rng(seed)
    kind = TENSOR_TYPE_BY_NAME[name]
    raw = rng.integers(0, 256, (rows * blocks, kind.nbytes), dtype=np.uint8)
    for start in SCALES[name]:
        raw[:, start : start + 2] = rng.normal(0, 0.1, (rows * blocks, 1)).astype("<f2").view(np.uint8)
    if name == "MXFP4":
        # a power of two of which a multiple is a float32
        raw[:, 0] %= 250
    return raw.reshape(rows, -1)


def test_block_sizes_and_type_numbers_are_ggmls() -> None:
    for number, kind in TENSOR_TYPES.items():
        assert GGMLQuantizationType(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (kind.block, kind.nbytes)


@pytest.mark.parametrize("name", QUANTISED)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_random_blocks_equal_the_gguf_package(name: str, rows: int, blocks: int, seed: int) -> None:
    raw = random_rows(name, rows, blocks, seed)
    ours = dequantize_rows(raw, TENSOR_TYPE_BY_NAME[name])
    theirs = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BY_PACKAGE)
def test_rarer_types_are_widened_a_few_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TENSOR_TYPE_BY_NAME[name]
    raw = np.random.default_rng(0).integers(0, 60, (5, 2 * kind.nbytes), dtype=np.uint8)
    monkeypatch.setattr(gguf_quants, "_VALUES_PER_CHUNK", 1024)
    np.testing.assert_array_equal(dequantize_rows(raw, kind), gguf.quants.dequantize(raw, GGMLQuantizationType[name]))


def test_rarer_types_without_their_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "rare.gguf", "llama")
    writer.add_tensor("w", np.zeros((3, 66), np.uint8), raw_dtype=GGMLQuantizationType.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "rare.gguf"
    data = memoryview(path.read_bytes())
    [info] = parse_header(data, path).tensors.values()
    assert info.kind.name == "TQ2_0" and info.shape == (3, 256)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="tensor 'w' has the type TQ2_0, which the gguf package reads: .*gguf"):
        parse_header(data, path)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_values_come_back_within_a_quantisation_step(name: str) -> None:
    values = np.random.default_rng(0).normal(0, 1, (7, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGMLQuantizationType[name])
    back = dequantize_rows(raw, TENSOR_TYPE_BY_NAME[name])
    span = np.ptp(values.reshape(-1, 32), axis=1).max()
    steps = {"Q4_0": 16, "Q4_1": 15, "Q5_0": 32, "Q5_1": 31, "Q8_0": 255}[name]
    assert np.abs(back - values).max() < 1.2 * span / steps


def test_a_q4_1_block_by_hand() -> None:
    block = np.zeros((1, 20), np.uint8)
    block[0, :4] = np.array([0.5, -2.0], "<f2").view(np.uint8)
    block[0, 4] = 0xF3
    expected = np.full(32, -2.0, np.float32)
    expected[0], expected[16] = 0.5 * 3 - 2, 0.5 * 15 - 2
    np.testing.assert_array_equal(dequantize_rows(block, TENSOR_TYPE_BY_NAME["Q4_1"])[0], expected)


def test_a_q6_k_block_by_hand() -> None:
    block = np.zeros((1, 210), np.uint8)
    block[0, 208:] = np.array([2.0], "<f2").view(np.uint8)
    block[0, 192:208] = np.arange(1, 17, dtype=np.int8).view(np.uint8)
    block[0, 0] = 0xA5  # low nibble: value 0, high nibble: value 64
    block[0, 128] = 0b11_00_00_01  # upper bits of value 0 (01) and of value 96 (11)
    expected = np.repeat(2.0 * np.arange(1, 17), 16).astype(np.float32) * -32
    expected[0] = 2.0 * 1 * (5 + 16 - 32)
    expected[64] = 2.0 * 5 * (10 - 32)
    expected[96] = 2.0 * 7 * (48 - 32)
    np.testing.assert_array_equal(dequantize_rows(block, TENSOR_TYPE_BY_NAME["Q6_K"])[0], expected)


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_float_types_keep_their_dtype_and_bits(name: str, dtype: type) -> None:
    values = np.random.default_rng(1).normal(0, 1, (3, 5)).astype(dtype)
    back = dequantize_rows(values.view(np.uint8), TENSOR_TYPE_BY_NAME[name])
    assert back.dtype == dtype
    np.testing.assert_array_equal(back.view(np.uint8), values.view(np.uint8))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows("Q4_K", 7, 2, 3)
    whole = dequantize_rows(raw, TENSOR_TYPE_BY_NAME["Q4_K"])
    monkeypatch.setattr(gguf_quants, "_VALUES_PER_CHUNK", 1100)
    np.testing.assert_array_equal(dequantize_rows(raw, TENSOR_TYPE_BY_NAME["Q4_K"]), whole)
