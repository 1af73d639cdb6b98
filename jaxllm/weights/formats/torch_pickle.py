"""Files that ``torch.save`` wrote (``pytorch_model.bin``), read without PyTorch and without running what is pickled.

A pickle names functions to call, so one from elsewhere could do anything. This reader knows a few names, those of
tensors and of the dictionaries that hold them, and puts descriptions in their place; it refuses a file that names
anything else. The numbers of a storage lie in the file as they are: in an entry of a zip archive that is not
compressed, or, as PyTorch wrote them before 1.6, one after the other behind the pickles.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxllm.weights.errors import WeightsError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
#: bytes of a number, and safetensors' name of the type, by torch's
_TYPES = {
    **{"Double": (8, "F64"), "Float": (4, "F32"), "Half": (2, "F16"), "BFloat16": (2, "BF16")},
    **{"Long": (8, "I64"), "Int": (4, "I32"), "Short": (2, "I16"), "Char": (1, "I8"), "Byte": (1, "U8")},
    "Bool": (1, "BOOL"),
}
#: those whose storage has no type of its own, by the type's name in `torch`
_LATER_TYPES = {"float8_e4m3fn": (1, "F8_E4M3"), "float8_e5m2": (1, "F8_E5M2"), "float8_e8m0fnu": (1, "U8")}
#: what the file of PyTorch before 1.6 begins with
_MAGIC = 0x1950A86A20F9469CFC6C
#: of the header of a file in an archive, which its name and more follow; where the lengths of these stand
_ENTRY_BYTES, _NAME_LENGTH, _MORE_LENGTH = 30, slice(26, 28), slice(28, 30)


class Place(NamedTuple):
    """Where in a file a tensor's numbers are."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    itemsize: int
    #: "" where only the tensor knows
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor: some numbers of a storage."""

    storage: _Storage
    itemsize: int
    dtype: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return math.prod(self.shape) == 0
            step *= size
        return True


def places(path: Path) -> dict[str, Place]:
    """The tensors of a file by their names.

    Raises ``WeightsError`` for a file that is cut off or no such file, that names what is no tensor, or in which a
    tensor's rows do not lie one behind the other.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            read = _of_archive if zipfile.is_zipfile(file) else _of_old_file
            file.seek(0)
            tensors, starts = read(file)
            return {name: _place(path, name, view, starts, size) for name, view in tensors.items()}
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:
        # whatever a pickle that is damaged makes of the few things that it may call
        raise WeightsError(f"{path}: truncated, corrupt or not a file of torch.save: {error!r}") from error


def _place(path: Path, name: str, view: object, starts: Mapping[str, int], size: int) -> Place:
    if not isinstance(view, _View):
        raise WeightsError(f"{path}: {name!r} is no tensor, but a {type(view).__name__}")
    if not view.is_contiguous:
        raise WeightsError(
            f"{path}: the numbers of tensor {name!r} are not in order (strides {view.strides} of shape {view.shape}). "
            "Save it with tensor.contiguous()."
        )
    nbytes = math.prod(view.shape) * view.itemsize
    start = starts.get(view.storage.key, -1)
    begin = start + view.first * view.itemsize
    if start < 0 or view.first < 0 or begin + nbytes > min(size, start + view.storage.count * view.storage.itemsize):
        raise WeightsError(f"{path}: truncated or corrupt: tensor {name!r} reaches beyond its numbers ({size} bytes)")
    return Place(view.dtype, view.shape, begin, nbytes)


def _of_archive(file: IO[bytes]) -> tuple[dict[str, object], dict[str, int]]:
    """The tensors, and where in the file each storage begins."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        found = [name for name in entries if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise pickle.UnpicklingError("an archive, but not one of torch.save: it has no data.pkl")
        root = found[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian. Save it anew on a little-endian machine.")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(found[0]))).load())
        starts = {}
        for name, entry in entries.items():
            if not name.startswith(f"{root}data/"):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"its entry {name!r} is compressed, which torch.save never does")
            file.seek(entry.header_offset)
            header = file.read(_ENTRY_BYTES)
            lengths = (int.from_bytes(header[part], "little") for part in (_NAME_LENGTH, _MORE_LENGTH))
            starts[name.removeprefix(f"{root}data/")] = entry.header_offset + _ENTRY_BYTES + sum(lengths)
    return tensors, starts


def _of_old_file(file: IO[bytes]) -> tuple[dict[str, object], dict[str, int]]:
    """As `_of_archive`, of a file that PyTorch wrote before 1.6."""
    if _Unpickler(file).load() != _MAGIC:
        raise pickle.UnpicklingError("not a file of torch.save")
    _Unpickler(file).load()  # the format's version
    system = _Unpickler(file).load()
    if not system.get("little_endian", True):
        raise pickle.UnpicklingError("its numbers are big-endian. Save it anew on a little-endian machine.")
    unpickler = _Unpickler(file)
    tensors = _tensors(unpickler.load())
    starts = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        file.seek(count * unpickler.storages[key].itemsize, io.SEEK_CUR)
    return tensors, starts


def _tensors(loaded: object) -> dict[str, object]:
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise pickle.UnpicklingError("what is saved is no dictionary of tensors by their names (a state_dict)")
    return loaded


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C makes room for as many objects as the highest number that one is remembered by,
    so that one wrong byte of a file could take all of the memory. Nothing that is read has bytes in a pickle.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Only what state dictionaries are made of."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name.removesuffix("Storage") in _TYPES:
            return name.removesuffix("Storage")
        if module == "torch" and name in _LATER_TYPES:
            return name
        raise pickle.UnpicklingError(
            f"its pickle wants {module}.{name}, which is no part of a state_dict and could run anything; nothing was "
            f'run. With PyTorch, where the file is trusted: safetensors.torch.save_file(torch.load("{SINGLE}"), '
            '"model.safetensors")'
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"it has a {kind!r} in place of numbers")
        itemsize, dtype = _TYPES.get(storage_type, (1, ""))
        return self.storages.setdefault(str(key), _Storage(str(key), itemsize, dtype, int(count)))


def _rebuild_tensor(storage: _Storage, first: int, shape: Any, strides: Any, *_: object) -> _View:
    return _View(storage, storage.itemsize, storage.dtype, int(first), tuple(shape), tuple(strides))


def _rebuild_typed_tensor(
    storage: _Storage, first: int, shape: Any, strides: Any, _grad: object, _hooks: object, dtype: str, *_: object
) -> _View:
    itemsize, name = _LATER_TYPES[dtype]
    return _View(storage, itemsize, name, int(first), tuple(shape), tuple(strides))


def _rebuild_parameter(data: _View, *_: object) -> _View:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "UntypedStorage"): "untyped",
}
