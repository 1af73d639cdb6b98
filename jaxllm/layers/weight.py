"""What a weight is, said once: its tensors in a checkpoint, what its axes mean, and what it holds before it is trained.

All else follows: shapes, shardings and bytes on each device (`parallel.rules`), what each device reads of a checkpoint,
and random weights (`weights.loader`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

#: the storage of a weight whose array holds its numbers as they are
DENSE = "dense"


class Axis(NamedTuple):
    """An axis of a tensor, by what it counts."""

    #: what it counts, by which `parallel.rules` knows whether it is split over devices
    name: str
    #: how many of it there are; a device gets whole ones
    units: int
    #: numbers of each: a head has `head_dim` of them
    width: int = 1

    @property
    def size(self) -> int:
        return self.units * self.width


class Rows(NamedTuple):
    """Where a part lies in a tensor that holds others, too: which rows its first axis has there."""

    #: the row at which its first unit begins
    first: int
    #: rows from the beginning of a unit to that of the next
    step: int
    #: of the whole tensor
    total: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, or some rows of one; `name` holds ``{layer}`` when there is one a layer."""

    name: str
    axes: tuple[Axis, ...]
    #: None: all rows of the tensor
    rows: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the tensor in which the part lies."""
        return self.shape if self.rows is None else (self.rows.total, *self.shape[1:])

    def in_tensor(self, first: int, last: int) -> tuple[slice, slice | np.ndarray]:
        """Where the part's rows from `first` to before `last`, one at least, lie in the tensor: the rows that hold them
        all, and which of these they are.
        """
        width = self.axes[0].width
        start, step, _ = self.rows or Rows(0, width, self.shape[0])
        if step == width:
            return slice(start + first, start + last), slice(None)
        units, rest = np.divmod(np.arange(first, last), width)
        at = start + units * step + rest
        return slice(int(at[0]), int(at[-1]) + 1), at - at[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One array of a model: its parts joined along their first axis, with the layers, if any, on an axis before it.

    A tree of these has the form of the model's params.
    """

    parts: tuple[Part, ...]
    #: the layers that are stacked in the array; None: it belongs to no layer
    layers: range | None = None
    #: what every number is in a randomly initialised model; None: they are drawn
    init: float | None = None
    #: None: the engine's dtype
    dtype: str | None = None
    #: in which form the numbers lie; a quantized one has a name of its own
    storage: str = DENSE

    @property
    def axes(self) -> tuple[tuple[Axis, ...], ...]:
        """The array's axes but that of the layers, each as the axes that are joined in it."""
        first, *rest = zip(*(part.axes for part in self.parts), strict=True)
        return (first, *((axis[0],) for axis in rest))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        leading = () if self.layers is None else (len(self.layers),)
        return (*leading, *(sum(axis.size for axis in joined) for joined in self.axes))

    def __getitem__(self, layers: slice) -> WeightSpec:
        """Of some of the layers, as a slice of the array along its first axis has them."""
        assert self.layers is not None
        return dataclasses.replace(self, layers=self.layers[layers])

    def tensors(self) -> list[tuple[str, Part]]:
        """Every tensor that this array is made of, by its name in the checkpoint."""
        return [(name, part) for name, part, _ in self.places()]

    def places(self) -> Iterator[tuple[str, Part, tuple[int | slice, ...]]]:
        """Every tensor by its name, and where in the whole array it lies."""
        for i, layer in enumerate(self.layers if self.layers is not None else (0,)):
            first = 0
            for part in self.parts:
                rows = slice(first, first + part.axes[0].size)
                first = rows.stop
                yield part.name.format(layer=layer), part, (rows,) if self.layers is None else (i, rows)


def is_spec(leaf: object) -> bool:
    return isinstance(leaf, WeightSpec)
