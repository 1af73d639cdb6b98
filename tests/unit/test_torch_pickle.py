"""Weights that torch.save wrote, read without it; torch is the oracle."""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import TensorFiles
from jaxllm.weights.formats.torch_pickle import INDEX, SINGLE, places

torch: Any = pytest.importorskip("torch")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


def some_tensors(seed: int = 0) -> dict[str, Any]:
    """Of all types, with parts of a storage, a parameter, one number and none."""
    made = torch.Generator().manual_seed(seed)
    whole = torch.randn(7, 6, 5, generator=made)
    return {
        **{str(dtype): whole.mul(100).to(dtype) for dtype in (*FLOATS, *OTHERS)},
        "part": whole[2:4],
        "row of a part": whole[3][1:2],
        "tied": whole,
        "one number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "one column": whole[:, :1, 0].contiguous().t(),
        "parameter": torch.nn.Parameter(whole[0].clone()),
    }


def bits(tensor: Any) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_read(directory: Path, tensors: dict[str, Any]) -> None:
    with TensorFiles(directory) as reader:
        assert set(reader.names()) == set(tensors)
        for name, tensor in tensors.items():
            found = reader.raw(name)
            assert found.shape == tuple(tensor.shape) == reader.shape(name)
            assert found.tobytes() == bits(tensor), name
            if tensor.ndim and len(tensor) > 1:
                assert reader.raw(name, slice(1, None)).tobytes() == bits(tensor[1:])


@pytest.mark.parametrize("new", [True, False], ids=["an archive", "before 1.6"])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_tensors_are_those_of_torch(tmp_path: Path, new: bool, kind: type):
    tensors = some_tensors()
    if not new:  # which knew no float8
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in name}
    torch.save(kind(tensors), tmp_path / SINGLE, _use_new_zipfile_serialization=new)
    assert_read(tmp_path, tensors)


def test_a_modules_state_is_read(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    torch.save(module.state_dict(), tmp_path / SINGLE)
    assert_read(tmp_path, module.state_dict())


def test_shards_are_joined_by_their_index(tmp_path: Path):
    tensors = some_tensors()
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_read(tmp_path, tensors)


class Harmful:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new", [True, False], ids=["an archive", "before 1.6"])
def test_nothing_that_is_pickled_is_run(tmp_path: Path, new: bool):
    marker = tmp_path / "ran"
    torch.save({"a": torch.zeros(2), "b": Harmful(marker)}, tmp_path / SINGLE, _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match=r"its pickle wants \w+\.mkdir, which is no part of a.*nothing was"):
        places(tmp_path / SINGLE)
    assert not marker.exists()


REFUSED = {
    "no tensor": ({"a": torch.zeros(2), "step": 7}, "'step' is no tensor, but a int"),
    "a list": ([torch.zeros(2)], "no dictionary of tensors by their names"),
    "turned": ({"a": torch.zeros(3, 4).t()}, r"tensor 'a' are not in order \(strides \(1, 4\) of shape \(4, 3\)\)"),
    "repeated": ({"a": torch.zeros(1, 4).expand(3, 4)}, "tensor 'a' are not in order"),
}


@pytest.mark.parametrize(("saved", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path: Path, saved: Any, message: str):
    torch.save(saved, tmp_path / SINGLE)
    with pytest.raises(WeightsError, match=message):
        places(tmp_path / SINGLE)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        # a dictionary is remembered as the number 2**23
        (b"\x80\x02}r" + (1 << 23).to_bytes(4, "little") + b".", "not a file of torch.save"),
        # 128 MiB follow
        (b"\x80\x05\x96" + (1 << 27).to_bytes(8, "little") + b"a.", "truncated"),
    ],
)
def test_a_small_file_takes_little_memory(tmp_path: Path, pickled: bytes, reason: str):
    (tmp_path / SINGLE).write_bytes(pickled)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=reason):
            places(tmp_path / SINGLE)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@functools.cache
def whole_file(new: bool) -> bytes:
    """The same in all of a test's runs: old files have addresses in them."""
    tensors, file = {"a": torch.arange(40.0).reshape(8, 5), "b": torch.zeros(3)}, io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


@pytest.mark.parametrize("new", [True, False], ids=["an archive", "before 1.6"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, new: bool, data: st.DataObject):
    """No damage leads to anything but weights' error, or to numbers that lie in the file."""
    path = tmp_path_factory.mktemp("damaged") / SINGLE
    content = bytearray(whole_file(new))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = places(path)
    except WeightsError:
        return
    assert all(0 <= place.offset <= place.offset + place.nbytes <= len(content) for place in found.values())
    with TensorFiles(path.parent) as reader:
        for name, place in found.items():
            if place.dtype != "BOOL":
                assert reader.raw(name).nbytes == place.nbytes
