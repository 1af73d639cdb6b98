"""The formats of packed weights (`runs.Format`), by the names of their kernels. How weights lie is told in
`quant_matmul.layout` and `quantized`, of a GGUF file's in `file_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, HALF_WORD, LANES, Code, Value
from pallas_kernels.packed_matmul.file_blocks import FILE_BLOCKS
from pallas_kernels.packed_matmul.runs import WIDTH, Format, Operand, Run, dim, nibbles, power_of_two, reached, row_of

#: (code, address) -> the next 32 numbers there, as a run's values
Numbers = Callable[[Code, Value], list[Value]]


def _plain(size: int, numbers: Numbers, factor: float | None = None) -> Format:
    """Numbers of `size` bytes [L, N, K]. Where a row has one scale, that is a factor of the result.

    Args:
        numbers: of them.
        factor: what they have to be multiplied by.
    """

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (values,) = weight
        return code.at(values.data, code.times(row_of(code, values, layer, row), code.times(columns, size)))

    def run(code: Code, start: Value, first: Value, behind: int) -> Run:
        here = reached(code, code.at(start, code.times(first, size)), behind * size, WIDTH * size)
        values = numbers(code, here)
        return Run(values, None if factor is None else ir.Constant(FLOAT, factor))

    return Format(columns=32, num_arrays=1, row=row, run=run)


def _scaled(
    numbers: Numbers, group: int, scale_dtype: str, *, has_zeros: bool = False, factor: float | None = None
) -> Format:
    """`ScaledWeight` in groups of `group`: bytes [L, N, K], scales and zeros int16 [L, N, K / g]. See `_plain`."""
    size = 4 if scale_dtype == "float32" else 2

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
        values, scales, *zeros = weight
        number = row_of(code, values, layer, row)
        first = code.times(number, code.divided(columns, group))
        start = code.at(values.data, code.times(number, columns))
        of_groups = code.at(scales.data, code.times(first, size))
        return start, of_groups, [code.at(each.data, code.times(first, 2)) for each in zeros]

    def run(code: Code, of_row: Any, first: Value, behind: int) -> Run:
        start, scales, zeros = of_row
        place = code.add(code.divided(first, group), behind // group)
        scale = code.number_of(code.at(scales, code.times(place, size)), scale_dtype)
        if factor is not None:
            scale = code.multiplied(scale, ir.Constant(FLOAT, factor))
        here = reached(code, code.at(start, first), behind, group)
        values = [part for at in range(0, group, 32) for part in numbers(code, code.at(here, at))]
        if not zeros:
            return Run(values, scale)
        zero = code.signed(code.load(code.at(zeros[0], code.times(place, 2)), HALF_WORD, align=2))
        return Run(values, scale, code.negated(code.multiplied(zero, scale)))

    return Format(columns=group, num_arrays=2 + has_zeros, row=row, run=run)


def _codebook(group: int, scale_dtype: str) -> Format:
    """`CodebookWeight` in groups of `group`: packed uint8 [L, N, K / 2], scales float32, or uint8, the exponents of
    powers of two, [L, N, K / g], and the table, float32 [16].
    """
    size = 4 if scale_dtype == "float32" else 1

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
        packed, scales, table = weight
        number = row_of(code, packed, layer, row)
        return (
            code.at(packed.data, code.times(number, code.divided(columns, 2))),
            code.at(scales.data, code.times(code.times(number, code.divided(columns, group)), size)),
            code.floats(table.data),
        )

    def run(code: Code, of_row: Any, first: Value, behind: int) -> Run:
        packed, scales, table = of_row
        at = code.at(scales, code.times(code.add(code.divided(first, group), behind // group), size))
        scale = code.load(at, FLOAT, align=4) if size == 4 else power_of_two(code, code.byte(at))
        start = reached(code, code.at(packed, code.divided(first, 2)), behind // 2, group // 2)
        codes = [code.bytes(code.at(start, place), LANES) for place in range(0, group // 2, LANES)]
        parts = [code.masked(part, 15) for part in codes] + [code.shifted_down(part, 4) for part in codes]
        return Run([code.looked_up_floats(table, part) for part in parts], scale)

    return Format(columns=group, num_arrays=3, row=row, run=run)


#: groups of sixteen that a vector of `WIDTH` bytes has
_GROUPS_AT_ONCE = 4


def _small_groups(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
    """Of `CodebookWeight` in groups of sixteen (NVFP4): packed uint8 [L, N, K / 2], scales e4m3 [L, N, K / 16],
    and the table, float32 [16]. A row's factor is one of the result.
    """
    packed, scales, table = weight
    number = row_of(code, packed, layer, row)
    return (
        code.at(packed.data, code.times(number, code.divided(columns, 2))),
        code.at(scales.data, code.times(number, code.divided(columns, 16))),
        # of scales come 256ths
        code.multiplied(code.floats(table.data), code.splat(ir.Constant(FLOAT, 256.0))),
    )


def _run_of_small_groups(code: Code, of_row: Any, first: Value, behind: int) -> Run:
    """Each number with its scale, whose product is exact: of e2m1 and e4m3 it has six bits."""
    packed, scales, table = of_row
    start = reached(code, code.at(packed, code.divided(first, 2)), behind // 2, 8 * _GROUPS_AT_ONCE)
    of_groups = code.e4m3(code.at(code.at(scales, code.divided(first, 16)), behind // 16), _GROUPS_AT_ONCE)
    of_groups = code.numbers(code.builder.fpext(of_groups, ir.VectorType(FLOAT, _GROUPS_AT_ONCE)))
    codes: list[Value] = []
    for place in range(0, 8 * _GROUPS_AT_ONCE, LANES):
        # the low and the high ones of two groups
        both = code.joined(*nibbles(code, code.at(start, place)))
        codes += [code.picked(both, [*range(at, at + 8), *range(LANES + at, LANES + at + 8)]) for at in (0, 8)]
    return Run(
        [
            code.multiplied(code.looked_up_floats(table, part), code.splat(scale))
            for part, scale in zip(codes, of_groups, strict=True)
        ]
    )


def _bytes(code: Code, address: Value) -> list[Value]:
    return [code.bytes(address, WIDTH)]


def _e4m3(code: Code, address: Value) -> list[Value]:
    """float32, a 256th of each number."""
    kind = ir.VectorType(FLOAT, LANES)
    return [code.builder.fpext(part, kind) for part in code.parts(code.e4m3(address))]


def _numbers_of(dtype: str) -> Numbers:
    size = 4 if dtype == "float32" else 2
    return lambda code, address: [code.numbers_of(code.at(address, at), dtype) for at in (0, size * LANES)]


def _int4(group: int, scale_dtype: str) -> Format:
    """`Int4Weight` in groups of `group`: packed uint8 [L, N, K / 2], scales and zeros uint8 [L, K / g, N]."""
    size = 4 if scale_dtype == "float32" else 2

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
        packed, scales, zeros = weight
        half_row, groups = code.divided(columns, 2), code.divided(columns, group)
        rows = dim(code, packed, 1)
        first = code.add(code.times(code.times(layer, groups), rows), row)
        return (
            code.at(packed.data, code.times(row_of(code, packed, layer, row), half_row)),
            code.at(scales.data, code.times(first, size)),
            code.at(zeros.data, first),
            rows,
        )

    def run(code: Code, of_row: Any, first: Value, behind: int) -> Run:
        packed, scales, zeros, rows = of_row
        skipped = code.times(code.add(code.divided(first, group), behind // group), rows)
        scale = code.number_of(code.at(scales, code.times(skipped, size)), scale_dtype)
        zero = code.load(code.at(zeros, skipped), BYTE)
        start = reached(code, code.at(packed, code.divided(first, 2)), behind // 2, group // 2)
        # the low ones of a group, then the high ones
        low, high = zip(*(nibbles(code, code.at(start, place)) for place in range(0, group // 2, LANES)), strict=True)
        codes = [*low, *high]
        # at most 16 off, which a byte holds
        zero = code.splat(zero, WIDTH)
        values = [code.joined(*codes[i : i + 2]) for i in range(0, len(codes), 2)]
        return Run([code.builder.sub(part, zero) for part in values], scale)

    return Format(columns=group, num_arrays=3, row=row, run=run)


#: groups that have a kernel, and the types of their scales
GROUPS = (32, 64, 128)
SCALE_DTYPES = ("bfloat16", "float16", "float32")

#: by the name of a kernel: of float32 numbers, which are multiplied in float32 whatever x is
FLOATS: dict[str, Format] = {
    "fp8": _plain(1, _e4m3, 256.0),
    **{
        f"fp8_{group}_{dtype}": _scaled(_e4m3, group, dtype, factor=256.0) for group in GROUPS for dtype in SCALE_DTYPES
    },
    **{f"codebook_{group}_{dtype}": _codebook(group, dtype) for group in GROUPS for dtype in ("float32", "uint8")},
    "codebook_16_float8_e4m3fn": Format(
        columns=16 * _GROUPS_AT_ONCE, num_arrays=3, row=_small_groups, run=_run_of_small_groups
    ),
    **{dtype: _plain(4 if dtype == "float32" else 2, _numbers_of(dtype)) for dtype in SCALE_DTYPES},
}
FORMATS: dict[str, Format] = {
    **FLOATS,
    "int8": _plain(1, _bytes),
    **{
        f"int8_{group}_{dtype}{end}": _scaled(_bytes, group, dtype, has_zeros=bool(end))
        for group in GROUPS
        for dtype in SCALE_DTYPES
        for end in ("", "_zeros")
    },
    **{f"int4_{group}_{dtype}": _int4(group, dtype) for group in GROUPS for dtype in SCALE_DTYPES},
    **FILE_BLOCKS,
}
