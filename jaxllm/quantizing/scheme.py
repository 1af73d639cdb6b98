"""How a model is to be quantized: what was asked for, checked, and what becomes of each of its matrices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout, Layout, ReorderedLayout, RoundedInputsLayout, ScaledLayout
from jaxllm.quantizing.grid import Grid, Rounded
from jaxllm.weights.quantization import awq, compressed_tensors, gptq, online, written_schemes
from jaxllm.weights.quantization.method import Method, inner, matches, packed_pairs
from jaxllm.weights.quantization.online import Online

#: the methods, each with the numbers of bits that it may have, the usual one first
METHODS: Mapping[str, tuple[int, ...]] = {"awq": (4,), "gptq": (4, 2, 3, 8), "int8": (8,), "fp8": (8,), "int4": (4,)}
#: those whose scales are of groups
GROUPED = ("awq", "gptq", "int4")
#: those that look at text to find the numbers
CALIBRATED = ("awq", "gptq")
#: columns that share a scale, the best first
GROUPS = (128, 64, 32)
#: what recipes call the head, which no method quantizes, whatever the model calls it
HEAD = "lm_head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What was asked for.

    Raises:
        ValidationError: the method does not have this choice; the text says which it has.
    """

    method: str
    #: None: the method's usual ones
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    #: modules that stay as they are: names, or ``re:`` and what matches the beginning of a name
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValidationError(f"method must be {', '.join(METHODS)}; got {self.method!r}.")
        known = METHODS[self.method]
        if self.bits is not None and self.bits not in known:
            others = "" if self.method == "gptq" else "; method='gptq' has 2, 3, 4 and 8"
            raise ValidationError(f"method={self.method!r} has {_listed(known)} bits; got {self.bits}{others}.")
        if self.group_size is not None and self.method not in GROUPED:
            raise ValidationError(
                f"method={self.method!r} has a scale a row, and no groups; got group_size={self.group_size}. Leave it "
                "out, or take int4, awq or gptq."
            )
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2) and self.group_size != -1:
            raise ValidationError(
                f"group_size must be even and above 0, 128 for example, or -1 for a whole row; got {self.group_size}."
            )
        if self.symmetric is False and self.method not in GROUPED:
            raise ValidationError(f"method={self.method!r} is symmetric; zero points are int4's, awq's and gptq's.")
        if self.desc_act and self.method != "gptq":
            raise ValidationError(f"desc_act is GPTQ's order of columns; method={self.method!r} has none.")
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValidationError(f"ignore: {pattern!r} is no regular expression: {error}.") from None

    @property
    def own_bits(self) -> int:
        return self.bits or METHODS[self.method][0]

    @property
    def is_symmetric(self) -> bool:
        return self.method not in ("awq", "int4") if self.symmetric is None else self.symmetric

    def ignores(self, module: str) -> bool:
        return any(matches(pattern, module) for pattern in self.ignore)


class MatrixForms:
    """What becomes of each matrix of a model.

    Args:
        shapes: [out, in] of all matrices that can be quantized, by their modules' names.
        others: modules with matrices that cannot.
        head: the module of the model's head.

    Raises:
        ValidationError: groups do not divide a matrix, or the format cannot hold one; the text names it.
    """

    def __init__(
        self, scheme: Scheme, shapes: Mapping[str, tuple[int, int]], others: Iterable[str], *, head: str = HEAD
    ):
        self.scheme = scheme
        quantized = {module: shape for module, shape in shapes.items() if not scheme.ignores(module)}
        others = [head, *others]
        # recipes name what no method quantizes, too, the head before all
        known = (*shapes, *others, HEAD)
        unknown = [pattern for pattern in scheme.ignore if not any(matches(pattern, module) for module in known)]
        if unknown:
            raise ValidationError(
                f"ignore: {unknown[0]!r} is none of the model's matrices, such as {next(iter(shapes), None)!r}."
            )
        if not quantized:
            raise ValidationError("Every matrix is left out by ignore: there is nothing to quantize.")
        self.left_out = [*others, *(module for module in shapes if module not in quantized)]
        self._group = self._common_group(quantized)
        self._check_words(quantized)
        self.layouts: dict[str, Layout] = {module: self._layout(*shape) for module, shape in quantized.items()}
        self.config: dict[str, Any] = self._configuration()
        self.writer: Method = {
            "awq": awq.AWQ,
            "gptq": gptq.GPTQ,
            "compressed-tensors": compressed_tensors.CompressedTensors,
        }[self.config["quant_method"]](self.config)

    def _common_group(self, shapes: Mapping[str, tuple[int, int]]) -> int | None:
        """Columns of a group, 0 for a row; None: each matrix has the largest of `GROUPS` that divides its rows."""
        scheme = self.scheme
        if scheme.method not in GROUPED or scheme.group_size == -1:
            return 0
        widths = {shape[1]: module for module, shape in reversed(list(shapes.items()))}
        if scheme.group_size is None and scheme.method == "int4":
            fits = [group for group in GROUPS if all(any(w % g == 0 for g in GROUPS) for w in widths)]
            if fits:
                return None
        common = [group for group in GROUPS if all(width % group == 0 for width in widths)]
        if scheme.group_size is None and common:
            return common[0]
        asked = scheme.group_size or GROUPS[-1]
        wrong = next((width for width in reversed(list(widths)) if width % asked), None)
        if wrong is not None:
            works = f"group_size={common[0]} divides all" if common else "group_size=-1 takes whole rows"
            raise ValidationError(
                f"Groups of {asked} do not divide the {wrong} columns of {widths[wrong]}: {works}; or leave the matrix "
                "out (ignore)."
            )
        return asked

    def _check_words(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """AWQ and GPTQ have whole words of 32 bits."""
        method, bits = self.scheme.method, self.scheme.own_bits
        for module, (rows, columns) in shapes.items():
            if (method == "awq" and rows % 8) or (method == "gptq" and (rows * bits % 32 or columns * bits % 32)):
                raise ValidationError(
                    f"{module} [{rows}, {columns}] does not fill whole words of 32 bits, which {method} needs: leave "
                    f"it out (ignore), or take method='int4'."
                )

    def _layout(self, rows: int, columns: int) -> Layout:
        scheme = self.scheme
        if scheme.method not in GROUPED:
            layout = Online(scheme.method).planned("model.weight", (rows, columns))
            assert layout is not None
            # in what others write them, so that a plan made of config.json alone is exact
            inside = inner(layout)
            assert isinstance(inside, ScaledLayout)
            own = dataclasses.replace(inside, scale_dtype="bfloat16")
            return dataclasses.replace(layout, layout=own) if isinstance(layout, RoundedInputsLayout) else own
        group = self._group or columns
        if self._group is None:
            group = next(group for group in GROUPS if columns % group == 0)
        layout = Int4Layout(group=group, scale_dtype="float16")
        if scheme.own_bits == 8:
            layout = ScaledLayout(dtype="int8", group=group, scale_dtype="float16", has_zeros=not scheme.is_symmetric)
        return ReorderedLayout(layout) if scheme.desc_act else layout

    def _configuration(self) -> dict[str, Any]:
        scheme, group = self.scheme, self._group or -1
        if scheme.method == "awq":
            return awq.configuration(group, self.left_out)
        if scheme.method == "gptq":
            return gptq.configuration(
                scheme.own_bits,
                group,
                symmetric=scheme.is_symmetric,
                reordered=scheme.desc_act,
                left_out=self.left_out[1:],
            )
        return written_schemes.configuration(self.layouts, self.left_out, symmetric=scheme.is_symmetric)

    def grid(self, layout: Layout) -> Grid:
        """Of a layout with groups."""
        own = inner(layout)
        assert isinstance(own, Int4Layout | ScaledLayout)
        return Grid(
            bits=self.scheme.own_bits,
            group=own.group,
            symmetric=self.scheme.is_symmetric,
            scale_dtype=own.scale_dtype,
            least_zero=1 if self.scheme.method == "gptq" else 0,
        )


def rounded_arrays(layout: Layout, rounded: Rounded, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The arrays of a layout (`Layout.shapes`) that hold a matrix on its grid."""
    own = inner(layout)
    codes, scales, zeros = (np.asarray(array) for array in (rounded.codes, rounded.scales, rounded.zeros))
    codes, arrays = codes.astype(np.uint8), {}
    if isinstance(own, Int4Layout):
        arrays["packed"] = packed_pairs(codes, own.group)
        arrays["zeros"] = zeros.astype(np.uint8)
    else:
        assert isinstance(own, ScaledLayout)
        arrays["values"] = (codes ^ 128).view(np.int8)
        if own.has_zeros:
            arrays["zeros"] = (zeros - 128).astype(np.int16)
    arrays["scales"] = scales.astype(own.scale_dtype)
    return arrays if order is None else {**arrays, "order": order}


def nearest_arrays(layout: Layout, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that hold what a matrix is rounded to while it is read (`weights.quantization.online`)."""
    return {kind: online.rounded(matrix, layout, kind) for kind in layout.shapes(*matrix.shape)}


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(numbers)))
