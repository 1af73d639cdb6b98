"""Safetensors files, written by the safetensors library or damaged by hand, through our reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.shards import ShardWriter
from jaxllm.weights.formats.tensor_files import INDEX, SINGLE, TensorFiles

TENSORS = {
    "a.weight": np.arange(15, dtype=np.float32).reshape(5, 3),
    "b.weight": np.linspace(-2, 2, 8).astype(ml_dtypes.bfloat16).reshape(4, 2),
    "c.bias": np.array([0.5, -1.25, 65504.0], np.float16),
    "d.scalar": np.array(1e-300),
    "e.empty": np.zeros((0, 7), np.float32),
    "f.bytes": np.arange(6, dtype=np.int8),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


def write(path: Path, header: object, data: bytes) -> None:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_every_tensor_comes_back_bit_equal(directory: Path):
    with TensorFiles(directory) as reader:
        assert set(reader.names()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tensor.shape
            if tensor.dtype != np.int8:
                read = reader.read(name)
                assert read.dtype == tensor.dtype and read.tobytes() == tensor.tobytes()
        assert reader.dtype("b.weight") == "BF16"


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 5), slice(1, 3), slice(4, 5), slice(2, None), slice(None, 2)])
def test_rows_are_a_slice_of_the_first_axis(directory: Path, rows: slice):
    with TensorFiles(directory) as reader:
        np.testing.assert_array_equal(reader.read("a.weight", rows), TENSORS["a.weight"][rows])


def test_unknown_names_and_types_are_refused_by_name(directory: Path):
    with TensorFiles(directory) as reader:
        with pytest.raises(WeightsError, match=r"no tensor 'g\.weight' among its 6"):
            reader.read("g.weight")
        with pytest.raises(WeightsError, match=r"'f\.bytes' has type I8; weights of type F64, F32, F16, BF16"):
            reader.read("f.bytes")


def test_a_file_cut_anywhere_is_refused_before_anything_is_read(directory: Path):
    path = directory / SINGLE
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(WeightsError, match=rf"{SINGLE}: truncated.* \({size} bytes\)"):
            TensorFiles(directory)


def test_a_file_that_shrinks_after_opening_is_refused_with_the_tensors_name(tmp_path: Path):
    save_file({"large": np.ones(100_000, np.float32)}, tmp_path / SINGLE)
    with TensorFiles(tmp_path) as reader:
        os.truncate(tmp_path / SINGLE, 300_000)
        with pytest.raises(WeightsError, match=rf"{SINGLE}: tensor 'large' is cut off"):
            reader.read("large")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CORRUPT = {
    "nothing": (b"", b""),
    "no JSON": (b"{]", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "no object": ([], b""),
    "deep JSON": (b"[" * 100_000, b""),
    "an entry that is no object": ({"a": 3}, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "offsets that are no integers": ({"a": {**F32, "data_offsets": [0.0, 8.0]}}, bytes(8)),
    "a negative offset": ({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
    "an end before the beginning": ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "a negative size": ({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "a shape that is no list": ({"a": {**F32, "shape": 2}}, bytes(8)),
    "a type that is no string": ({"a": {**F32, "dtype": 32}}, bytes(8)),
    "a shape of another size": ({"a": {**F32, "shape": [3]}}, bytes(8)),
    "a type of another size": ({"a": {**F32, "dtype": "F16"}}, bytes(8)),
    "an overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "two tensors in one place": ({"a": F32, "b": F32}, bytes(8)),
    "a hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "bytes after the last tensor": ({"a": F32}, bytes(9)),
}


@pytest.mark.parametrize(("header", "data"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_header_is_refused_with_the_files_name(tmp_path: Path, header: object, data: bytes):
    write(tmp_path / SINGLE, header, data)
    with pytest.raises(WeightsError, match=SINGLE):
        TensorFiles(tmp_path)


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path: Path):
    (tmp_path / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match=r"truncated, .*header too large \(10 bytes\)"):
        TensorFiles(tmp_path)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_wrong_byte_gives_a_weights_error_or_readable_tensors(tmp_path: Path, at: int, value: int):
    path = tmp_path / SINGLE
    save_file({"a": np.ones((3, 2), np.float32), "b": np.ones(4, np.float16)}, path)
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = value
    path.write_bytes(raw)
    try:
        with TensorFiles(tmp_path) as reader:
            for name in reader.names():
                reader.read(name)
    except WeightsError as error:
        assert str(path) in str(error)


def shards(directory: Path) -> dict[str, str]:
    save_file({"a": np.ones(3, np.float32), "b": np.full(2, 2, np.float32)}, directory / "model-1-of-2.safetensors")
    save_file({"c": np.full((1, 2), 3, np.float16)}, directory / "model-2-of-2.safetensors")
    return {"a": "model-1-of-2.safetensors", "b": "model-1-of-2.safetensors", "c": "model-2-of-2.safetensors"}


def test_shards_are_found_through_the_index(tmp_path: Path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards(tmp_path)}))
    save_file({"a": np.zeros(9, np.float32)}, tmp_path / "other.safetensors")
    with TensorFiles(tmp_path) as reader:
        assert sorted(reader.names()) == ["a", "b", "c"]
        assert [reader.read(name).ravel()[0] for name in "abc"] == [1, 2, 3]


def test_shards_without_an_index_are_taken_together(tmp_path: Path):
    shards(tmp_path)
    with TensorFiles(tmp_path) as reader:
        assert sorted(reader.names()) == ["a", "b", "c"]
    save_file({"c": np.zeros(1, np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"more\.safetensors: tensor 'c' is in another file"):
        TensorFiles(tmp_path)


BAD_INDEX: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "a missing shard": (lambda m: {"weight_map": {**m, "d": "model-3.safetensors"}}, r"shard model-3\.safetensors is"),
    "a tensor in the wrong shard": (lambda m: {"weight_map": {**m, "c": m["a"]}}, "'c' should be in model-1-of-2"),
    "a tensor nowhere": (lambda m: {"weight_map": {**m, "d": m["a"]}}, "'d' should be in model-1-of-2"),
    "no weight map": (lambda m: {"map": m}, "not a readable index"),
    "a list": (lambda m: {"weight_map": list(m)}, "not a readable index"),
    "a shard without a name": (lambda m: {"weight_map": {**m, "c": None}}, "not a readable index"),
    "no object": (lambda m: 3, "not a readable index"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path: Path, change, message: str):
    (tmp_path / INDEX).write_text(json.dumps(change(shards(tmp_path))))
    with pytest.raises(WeightsError, match=message) as caught:
        TensorFiles(tmp_path)
    assert INDEX in str(caught.value)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"there is no \.safetensors file$"):
        TensorFiles(tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(
        WeightsError, match=r"no \.safetensors file, nor pytorch_model\.bin, but consolidated\.00\.pth: a"
    ):
        TensorFiles(tmp_path)


def test_what_there_is_no_room_for_is_not_begun(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"the weights take 1152921504\.61 GB, and [\d.]+ GB are free: make room"):
        ShardWriter(tmp_path, 2**60)
