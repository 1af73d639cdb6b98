"""What a weight is, said once: its tensors in a checkpoint, what its axes mean, and what it holds before it is trained.

All else follows: shapes, shardings and bytes on each device (`parallel.rules`), what each device reads of a checkpoint,
and random weights (`weights.loader`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np


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
    #: units that lie next to each other; `step` goes to the next ones
    run: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, or some rows of one; `name` holds ``{layer}`` when there is one a layer, and
    ``{expert}`` when there is one an expert; a tensor of a layer's experts that has none has all of them, on an axis in
    front.
    """

    name: str
    axes: tuple[Axis, ...]
    #: None: all rows of the tensor
    rows: Rows | None = None
    #: whether the tensor's last two axes are the other way round
    transposed: bool = False
    #: what checkpoints of another time have in its place
    alternative: Part | None = None
    #: whether the tensor is one number, without the axis that it has here
    scalar: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the tensor in which the part lies."""
        if self.scalar:
            return ()
        return self.shape if self.rows is None else (self.rows.total, *self.shape[1:])

    def in_tensor(self, first: int, last: int) -> tuple[slice, slice | np.ndarray]:
        """Where the part's rows from `first` to before `last`, one at least, lie in the tensor: the rows that hold them
        all, and which of these they are.
        """
        width = self.axes[0].width
        start, step, _, run = self.rows or Rows(0, width, self.shape[0])
        width *= run
        if step == width or first // width == (last - 1) // width:
            begin = start + first // width * step + first % width
            return slice(begin, begin + last - first), slice(None)
        units, rest = np.divmod(np.arange(first, last), width)
        at = start + units * step + rest
        return slice(int(at[0]), int(at[-1]) + 1), at - at[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One array of a model: its parts joined along their first axis, with the layers and the experts, if any, on axes
    before it.

    A tree of these has the form of the model's params.
    """

    parts: tuple[Part, ...]
    #: the layers that are stacked in the array; None: it belongs to no layer
    layers: range | None = None
    #: what is stacked behind the layers: each has all of the parts; None: there are none
    experts: Axis | None = None
    #: what every number is in a randomly initialised model; None: they are drawn
    init: float | None = None
    #: None: the engine's dtype
    dtype: str | None = None
    #: whether the array's last two axes are the other way round, and parts are joined along the last
    columns_first: bool = False

    @property
    def axes(self) -> tuple[tuple[Axis, ...], ...]:
        """The array's axes but that of the layers, each as the axes that are joined in it."""
        first, *rest = zip(*(part.axes for part in self.parts), strict=True)
        axes = (first, *((axis[0],) for axis in rest))
        axes = axes[::-1] if self.columns_first else axes
        return (*(() if self.experts is None else ((self.experts,),)), *axes)

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
        """Every tensor by its name, and where in the whole array it lies; one that has all experts is there for each of
        them.
        """
        for i, layer in enumerate(self.layers if self.layers is not None else (0,)):
            for expert in range(1 if self.experts is None else self.experts.units):
                stacked = (() if self.layers is None else (i,)) + (() if self.experts is None else (expert,))
                first = 0
                for part in self.parts:
                    rows = slice(first, first + part.axes[0].size)
                    first = rows.stop
                    place = (slice(None), rows) if self.columns_first else (rows,)
                    yield part.name.format(layer=layer, expert=expert), part, (*stacked, *place)

    def has_all_experts(self, part: Part) -> bool:
        """Whether the part's tensor has every expert's, on an axis in front."""
        return self.experts is not None and "{expert}" not in part.name

    def tensor_shape(self, part: Part) -> tuple[int, ...]:
        """Of the tensor in which a part lies."""
        shape = part.tensor_shape[::-1] if part.transposed else part.tensor_shape
        return (self.experts.units, *shape) if self.experts and self.has_all_experts(part) else shape

    def as_stored(self, names: Container[str]) -> WeightSpec:
        """Of the tensors that a checkpoint with these names has."""

        def found(part: Part) -> Part:
            first = 0 if self.layers is None else self.layers[0]
            have = [
                option
                for option in (part, part.alternative)
                if option is not None and option.name.format(layer=first, expert=0) in names
            ]
            return have[0] if have else part

        return dataclasses.replace(self, parts=tuple(map(found, self.parts)))


def is_spec(leaf: object) -> bool:
    return isinstance(leaf, WeightSpec)
