"""What a format of quantized checkpoints is: which matrices it has, and how its tensors become a layout's arrays."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Layout, ReorderedLayout, RoundedInputsLayout
from jaxllm.weights.errors import WeightsError

#: what the names of heads begin with, which formats leave as they are unless a checkpoint says otherwise
HEADS = ("lm_head.", "embed_out.")


#: types that no weight has by itself
_NO_WEIGHTS = ("F8_E4M3", "I8", "U8", "I32")


class StoredTensors(Protocol):
    """A checkpoint's tensors as they lie there, whatever their type."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str:
        """In the file format's words, for example ``F8_E4M3``."""
        ...

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray: ...
    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `read`, of any type that the file can have."""
        ...


@dataclasses.dataclass(frozen=True)
class Found:
    """A quantized matrix of a checkpoint."""

    layout: Layout
    #: of the matrix, [out, in]
    shape: tuple[int, int]
    #: how many matrices are stacked under this name; 0: it is one
    stacked: int = 0


class Method(abc.ABC):
    """A format, with a checkpoint's choices in it.

    A matrix goes by its name in the model, ``model.layers.0.mlp.down_proj.weight``.
    """

    #: vLLM's name
    name: ClassVar[str]
    #: what a quantized matrix has beside, or in place of, its ``.weight``: ends of the tensors' names behind the
    #: module's
    tensors: ClassVar[tuple[str, ...]]
    #: those of them of which one is there if, and only if, a matrix is quantized
    markers: ClassVar[tuple[str, ...]]
    #: whether it is the checkpoint's own form
    in_files: ClassVar[bool] = True
    #: whether matrices that are no experts' stay as they are
    only_experts: ClassVar[bool] = False

    def find(self, tensors: StoredTensors) -> dict[str, Found]:
        """The quantized matrices of a checkpoint.

        Raises:
            WeightsError: a tensor is missing, or has a shape that does not fit the others.
        """
        modules = dict.fromkeys(
            name.removesuffix(end) for name in tensors.names() for end in self.markers if name.endswith(end)
        )
        for name in tensors.names():
            module, _, end = name.rpartition(".")
            is_weight = end == "weight" and ".weight" in self.tensors and tensors.dtype(name) in _NO_WEIGHTS
            is_packed = end == "weight_packed" or (end == "qzeros" and ".qzeros" in self.tensors)
            if module not in modules and (is_weight or is_packed):
                wanted = " or ".join(repr(module + marker) for marker in self.markers)
                raise WeightsError(f"the checkpoint has no tensor {wanted}, which {name!r} needs")
        return {f"{module}.weight": self.look(tensors, module) for module in modules}

    @abc.abstractmethod
    def look(self, tensors: StoredTensors, module: str) -> Found:
        """A quantized matrix. Raises WeightsError as `find` does."""

    @abc.abstractmethod
    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        """How a matrix of a checkpoint with this configuration lies, by the configuration alone; None: unquantized."""

    @abc.abstractmethod
    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        """One of the arrays of the matrix's layout, with the matrix's rows.

        Args:
            kind: a name of `Layout.shapes`.
            rows: which rows are wanted.
            within: which of the matrices that are stacked under this name.

        Returns:
            These rows, or all, if `whole_matrices`.
        """

    #: whether `array` takes as long for some rows as for all, and gives all
    whole_matrices: ClassVar[bool] = True
    #: whether `written` is there
    writes: ClassVar[bool] = False

    def written(self, name: str, found: Found, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a matrix of which `array` makes these arrays again, bit for bit, by their names.

        Args:
            arrays: all of the layout's, by their names (`Layout.shapes`), with all of the matrix's rows.

        Raises:
            ValidationError: the format cannot hold them.
        """
        raise NotImplementedError


def needs(tensors: StoredTensors, name: str, shape: Sequence[int | None] | None = None) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Args:
        shape: what it must be; None in it: anything.

    Raises:
        WeightsError: it is not there, or has another shape.
    """
    if name not in tensors.names():
        raise WeightsError(f"the checkpoint has no tensor {name!r}, which its quantized matrix needs")
    found = tensors.shape(name)
    if shape is not None and not (
        len(found) == len(shape) and all(want is None or have == want for have, want in zip(found, shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise WeightsError(f"tensor {name!r} has shape {found}, and beside the matrix's others it must be [{wanted}]")
    return found


def check_groups(tensors: StoredTensors, name: str, columns: int, groups: int) -> np.ndarray:
    """The tensor that says the group of each column of a matrix (act-order), i32 [K].

    Raises:
        WeightsError: it has another shape, or groups of different sizes.
    """
    needs(tensors, name, (columns,))
    of_column = tensors.raw(name)
    counts = np.bincount(of_column.clip(0), minlength=groups)
    if of_column.min() < 0 or len(counts) != groups or (counts != columns // groups).any():
        raise WeightsError(
            f"tensor {name!r} must give each of the {groups} groups {columns // groups} of the matrix's {columns} "
            "columns"
        )
    return of_column


def inner(layout: Layout) -> Layout:
    """Without what is around it."""
    while isinstance(layout, (ReorderedLayout, RoundedInputsLayout)):
        layout = layout.layout
    return layout


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of so many bits that lie one after the other in the 32-bit words of the last axis, from the lowest bit
    on, across words: uint8 [..., count].
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    if 32 % bits == 0:
        each = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
        return each.reshape(*words.shape[:-1], -1)[..., :count].astype(np.uint8)
    first, shift = np.divmod(np.arange(count) * bits, 32)
    low = words[..., first] >> shift.astype(np.uint32)
    following = words[..., np.minimum(first + 1, words.shape[-1] - 1)].astype(np.uint64)
    high = (following << (32 - shift).astype(np.uint64)).astype(np.uint32)
    high = np.where(shift + bits > 32, high, 0)
    return ((low | high) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def as_stream(numbers: np.ndarray, bits: int) -> np.ndarray:
    """`stream` backwards: numbers [..., n] to words i32 [..., ceil(n * bits / 32)], filled up with zeros."""
    each = (numbers[..., None] >> np.arange(bits, dtype=numbers.dtype)) & 1
    octets = np.packbits(each.astype(np.uint8).reshape(*numbers.shape[:-1], -1), axis=-1, bitorder="little")
    filled = np.pad(octets, [*[(0, 0)] * (octets.ndim - 1), (0, -octets.shape[-1] % 4)])
    return np.ascontiguousarray(filled).view("<i4")


def packed_pairs(codes: np.ndarray, group: int) -> np.ndarray:
    """Codes 0..15 [N, K] as `quant_matmul.layout.pack` has them, in numpy: uint8 [N, K / 2]."""
    rows, columns = codes.shape
    halves = codes.reshape(rows, columns // group, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, columns // 2).astype(np.uint8)


def codes_of(packed: np.ndarray, group: int) -> np.ndarray:
    """`packed_pairs` backwards: uint8 [N, K]."""
    rows, half = packed.shape
    groups = packed.reshape(rows, -1, group // 2)
    return np.stack([groups & 15, groups >> 4], axis=2).reshape(rows, half * 2)


def in_their_places(codes: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Columns that lie in another order (`ReorderedLayout`), where the matrix has them; None: they lie so."""
    if order is None:
        return codes
    placed = np.empty_like(codes)
    placed[:, order] = codes
    return placed


def matches(pattern: str, module: str) -> bool:
    """A name, or ``re:`` and a regular expression that matches its beginning."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression of a quantization_config. `re` itself keeps 512, and some checkpoints have one a module.

    Raises ValidationError where it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValidationError(
            f"quantization_config of config.json has {pattern!r}, which is no regular expression: {error}. Correct it "
            "there."
        ) from None


def one_of(config: Mapping[str, Any], name: str, known: Sequence[Any], default: Any) -> Any:
    """A field of a quantization_config. Raises ValidationError where its value is not known."""
    value = config.get(name, default)
    if value not in known:
        raise ValidationError(
            f"quantization_config of config.json says {name}={value!r}; known are {', '.join(map(repr, known))}: take "
            'a checkpoint with one of these, or the model in 16 bits with quantization="int8", "fp8" or "int4".'
        )
    return value
