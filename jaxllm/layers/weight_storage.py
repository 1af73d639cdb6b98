"""In which form a matrix lies in memory: from the spec of its numbers to the specs of the arrays that hold them.

A quantized weight is a tree (`pallas_kernels.quantized`), and its spec is that tree with `WeightSpec`s in the arrays'
place. So shapes, shardings, bytes, loading and saving know nothing of it. The tensors of such an array are called after
the matrix's, ``model.layers.0.mlp.down_proj.weight#scales``, and have the matrix's rows, whatever a checkpoint calls
them and however they lie there: it is read through `weights.quantization.reader`, which knows.
"""
# A tree of specs has the form of the weight, with other leaves.
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

from jaxllm.layers.weight import Axis, Part, WeightSpec
from pallas_kernels.gguf_blocks import BLOCKS, BlockWeight
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, Joined, Reordered, RoundedInputs, ScaledWeight

#: between the name of a matrix and that of one of the arrays that hold it
MARK = "#"
#: of random weights
DEVIATION = 0.02


class Layout(Protocol):
    """How the numbers of a matrix [N, K] lie in memory. Hashable."""

    def specs(self, spec: WeightSpec) -> Any:
        """The tree that stands in the place of a matrix's spec."""
        ...

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Of the arrays that hold a matrix of this shape, as a reader has them, by their names."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Layout:
    """`Int4Weight` in groups of `group` columns."""

    group: int
    scale_dtype: str

    def specs(self, spec: WeightSpec) -> Int4Weight:
        # random codes are all sixteen, as often
        deviation = math.sqrt((16**2 - 1) / 12)
        return Int4Weight(
            packed=_array(spec, "packed", "uint8", self.group, times=self.group // 2),
            scales=_array(spec, "scales", self.scale_dtype, self.group, init=DEVIATION / deviation, columns_first=True),
            zeros=_array(spec, "zeros", "uint8", self.group, init=8, columns_first=True),
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        groups = rows, columns // self.group
        return {"packed": (rows, columns // 2), "scales": groups, "zeros": groups}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLayout:
    """`ScaledWeight`."""

    #: int8 or float8_e4m3fn
    dtype: str
    #: columns that share a scale; 0: all
    group: int
    scale_dtype: str
    has_zeros: bool = False

    def specs(self, spec: WeightSpec) -> ScaledWeight:
        # random integers are all 256, as often; random floats have the deviation themselves
        deviation = math.sqrt((256**2 - 1) / 12) if self.dtype == "int8" else DEVIATION
        group = self.group or spec.parts[0].axes[1].size
        return ScaledWeight(
            values=_array(spec, "values", self.dtype, 1),
            scales=_array(spec, "scales", self.scale_dtype, group, init=DEVIATION / deviation),
            zeros=_array(spec, "zeros", "int16", group, init=0) if self.has_zeros else None,
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        groups = rows, columns // (self.group or columns)
        return {"values": (rows, columns), "scales": groups, **({"zeros": groups} if self.has_zeros else {})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookLayout:
    """`CodebookWeight`."""

    table: tuple[float, ...]
    group: int
    #: float32, or float8_e4m3fn, or uint8 (e8m0)
    scale_dtype: str
    has_factors: bool = False

    def specs(self, spec: WeightSpec) -> CodebookWeight:
        deviation = math.sqrt(sum(number**2 for number in self.table) / 16)
        scale = DEVIATION / deviation
        init = 127 + round(math.log2(scale)) if self.scale_dtype == "uint8" else 1.0 if self.has_factors else scale
        row = spec.parts[0].axes[1].size
        return CodebookWeight(
            packed=_array(spec, "packed", "uint8", self.group, times=self.group // 2),
            scales=_array(spec, "scales", self.scale_dtype, self.group, init=init),
            factors=_array(spec, "factors", "float32", row, init=scale) if self.has_factors else None,
            table=self.table,
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        factors = {"factors": (rows, 1)} if self.has_factors else {}
        return {"packed": (rows, columns // 2), "scales": (rows, columns // self.group), **factors}


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """`BlockWeight`."""

    #: a name of `pallas_kernels.gguf_blocks.BLOCKS`
    kind: str

    def specs(self, spec: WeightSpec) -> BlockWeight:
        block, nbytes, _ = BLOCKS[self.kind]
        return BlockWeight(data=_array(spec, "data", "uint8", block, times=nbytes), kind=self.kind)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        block, nbytes, _ = BLOCKS[self.kind]
        return {"data": (rows, columns // block * nbytes)}


@dataclasses.dataclass(frozen=True)
class ReorderedLayout:
    """`Reordered`."""

    layout: Layout

    def specs(self, spec: WeightSpec) -> Reordered:
        part = spec.parts[0]
        columns = dataclasses.replace(
            part, name=f"{part.name}{MARK}order", axes=(Axis("order", part.axes[1].size),), rows=None, alternative=None
        )
        return Reordered(
            weight=self.layout.specs(spec), order=dataclasses.replace(spec, parts=(columns,), dtype="int32", init=0)
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {**self.layout.shapes(rows, columns), "order": (columns,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedInputsLayout:
    """`RoundedInputs`."""

    layout: Layout
    dtype: str
    group: int = 0
    #: whether the checkpoint says one scale for all inputs
    static: bool = False

    def specs(self, spec: WeightSpec) -> RoundedInputs:
        scales = None
        if self.static:
            one = Axis("inputs", 1)
            parts = (
                dataclasses.replace(part, name=f"{part.name}{MARK}inputs", axes=(one,), rows=None, alternative=None)
                for part in spec.parts
            )
            scales = dataclasses.replace(spec, parts=tuple(parts), dtype="float32", init=1.0)
        return RoundedInputs(weight=self.layout.specs(spec), scales=scales, dtype=self.dtype, group=self.group)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {**self.layout.shapes(rows, columns), **({"inputs": (1,)} if self.static else {})}


def stored(spec: WeightSpec, layouts: tuple[Layout | None, ...]) -> Any:
    """The spec of a matrix whose parts lie so.

    Args:
        layouts: of each part; None: as an array of the engine's dtype.
    """
    first, *others = layouts
    if not others or (all(layout == first for layout in others) and not _is_reordered(first)):
        return spec if first is None else first.specs(spec)
    one = (dataclasses.replace(spec, parts=(part,)) for part in spec.parts)
    return Joined(tuple(stored(each, (layout,)) for each, layout in zip(one, layouts, strict=True)))


def _is_reordered(layout: Layout | None) -> bool:
    """Whether each part has an order of its own."""
    return isinstance(layout, ReorderedLayout) or (
        isinstance(layout, RoundedInputsLayout) and _is_reordered(layout.layout)
    )


def _array(
    spec: WeightSpec,
    kind: str,
    dtype: str,
    columns: int,
    *,
    times: int = 1,
    init: float | None = None,
    columns_first: bool = False,
) -> WeightSpec:
    """Of an array that has `times` numbers for so many columns of a matrix."""

    def part_of(part: Part) -> Part:
        rows, across = part.axes
        # a factor of a whole row is one of each device's part of it
        is_factor = times == 1 and columns == across.size
        fewer = Axis("group", 1) if is_factor else divided(across, columns)
        other = None if part.alternative is None else part_of(part.alternative)
        return dataclasses.replace(
            part,
            name=f"{part.name}{MARK}{kind}",
            axes=(rows, Axis(fewer.name, fewer.units, fewer.width * times)),
            transposed=False,
            alternative=other,
        )

    parts = tuple(map(part_of, spec.parts))
    return dataclasses.replace(spec, parts=parts, dtype=dtype, init=init, columns_first=columns_first)


def divided(axis: Axis, columns: int) -> Axis:
    """An axis with one number for so many of its own, which they divide; of whole units where these divide a unit."""
    if axis.width % columns == 0:
        return Axis(axis.name, axis.units, axis.width // columns)
    return Axis(axis.name, axis.size // columns)
