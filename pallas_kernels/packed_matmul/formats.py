"""How the numbers of packed weights are read by a kernel for CPUs: a `Format` for each way in which they lie.

A format says which numbers a row of a weight is, in runs of columns: small integers, exact in float32, or float32
numbers, and what they are multiplied with and raised by. How they lie is told in `quant_matmul.layout`, `quantized` and
`gguf_blocks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, HALF_WORD, LANES, POINTER, Code, Value
from pallas_kernels.gguf_blocks import E2M1_DOUBLED, IQ4_TABLE


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring columns that share a scale: ``w = scale * values + minimum``."""

    #: vectors of `LANES` integers, i8; of a format of `FLOATS` float32
    values: list[Value]
    #: float32; None: 1
    scale: Value | None = None
    #: float32; None: 0
    minimum: Value | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One way in which weights lie."""

    #: columns that the kernel takes at once
    columns: int
    #: arrays of a weight
    num_arrays: int
    #: (code, operands of the weight, layer, row, columns of a row) -> what `runs` needs of a row
    row: Callable[[Code, list[Operand], Value, Value, Value], Any]
    #: (code, what `row` gave, the first column) -> the runs of the next `columns`, from left to right
    runs: Callable[[Code, Any, Value], list[Run]]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a kernel was given."""

    data: Value
    dims: Value


#: (code, address) -> the next 32 numbers there, in parts of `LANES`
Numbers = Callable[[Code, Value], list[Value]]


def operand(code: Code, table: Value, i: int) -> Operand:
    """An array of a kernel's table (`cpu_ffi.work_sharing`)."""
    return Operand(code.load(code.at(table, 16 * i), POINTER), code.load(code.at(table, 16 * i + 8), POINTER))


def floats(code: Code, run: Run) -> list[Value]:
    """A run's values as float32 vectors."""
    return [part if part.type.element == FLOAT else code.signed(part) for part in run.values]


def _plain(size: int, numbers: Numbers, factor: float | None = None) -> Format:
    """Numbers of `size` bytes [L, N, K]. Where a row has one scale, that is a factor of the result.

    Args:
        numbers: of them.
        factor: what they have to be multiplied by.
    """

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (values,) = weight
        return code.at(values.data, code.times(_row_of(code, values, layer, row), code.times(columns, size)))

    def runs(code: Code, start: Value, first: Value) -> list[Run]:
        values = numbers(code, code.at(start, code.times(first, size)))
        return [Run(values, None if factor is None else ir.Constant(FLOAT, factor))]

    return Format(columns=32, num_arrays=1, row=row, runs=runs)


def _scaled(
    numbers: Numbers, group: int, scale_dtype: str, *, has_zeros: bool = False, factor: float | None = None
) -> Format:
    """`ScaledWeight` in groups of `group`: bytes [L, N, K], scales and zeros int16 [L, N, K / g]. See `_plain`."""
    size = 4 if scale_dtype == "float32" else 2

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
        values, scales, *zeros = weight
        number = _row_of(code, values, layer, row)
        first = code.times(number, code.divided(columns, group))
        start = code.at(values.data, code.times(number, columns))
        of_groups = code.at(scales.data, code.times(first, size))
        return start, of_groups, [code.at(each.data, code.times(first, 2)) for each in zeros]

    def runs(code: Code, of_row: Any, first: Value) -> list[Run]:
        start, scales, zeros = of_row
        place = code.divided(first, group)
        scale = code.number_of(code.at(scales, code.times(place, size)), scale_dtype)
        if factor is not None:
            scale = code.multiplied(scale, ir.Constant(FLOAT, factor))
        here = code.at(start, first)
        values = [part for at in range(0, group, 32) for part in numbers(code, code.at(here, at))]
        if not zeros:
            return [Run(values, scale)]
        zero = code.signed(code.load(code.at(zeros[0], code.times(place, 2)), HALF_WORD, align=2))
        return [Run(values, scale, code.negated(code.multiplied(zero, scale)))]

    return Format(columns=group, num_arrays=2 + has_zeros, row=row, runs=runs)


def _codebook(group: int, scale_dtype: str) -> Format:
    """`CodebookWeight` in groups of `group`: packed uint8 [L, N, K / 2], scales float32, or uint8, the exponents of
    powers of two, [L, N, K / g], and the table, float32 [16].
    """
    size = 4 if scale_dtype == "float32" else 1

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Any:
        packed, scales, table = weight
        number = _row_of(code, packed, layer, row)
        return (
            code.at(packed.data, code.times(number, code.divided(columns, 2))),
            code.at(scales.data, code.times(code.times(number, code.divided(columns, group)), size)),
            code.floats(table.data),
        )

    def runs(code: Code, of_row: Any, first: Value) -> list[Run]:
        packed, scales, table = of_row
        at = code.at(scales, code.times(code.divided(first, group), size))
        scale = code.load(at, FLOAT, align=4) if size == 4 else _power_of_two(code, code.byte(at))
        start = code.at(packed, code.divided(first, 2))
        codes = [code.bytes(code.at(start, place), LANES) for place in range(0, group // 2, LANES)]
        parts = [code.masked(part, 15) for part in codes] + [code.shifted_down(part, 4) for part in codes]
        return [Run([code.looked_up_floats(table, part) for part in parts], scale)]

    return Format(columns=group, num_arrays=3, row=row, runs=runs)


def _power_of_two(code: Code, exponent: Value) -> Value:
    """float32 2 ** (e - 127) of an i32 0..255: its bits, but for 0, which is subnormal."""
    is_zero = code.builder.icmp_unsigned("==", exponent, code.all(0, exponent))
    bits = code.builder.select(is_zero, code.all(1 << 22, exponent), code.shifted_up(exponent, 23))
    return code.builder.bitcast(bits, FLOAT)


def _bytes(code: Code, address: Value) -> list[Value]:
    return code.parts(code.bytes(address, 32))


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
        rows = _dim(code, packed, 1)
        first = code.add(code.times(code.times(layer, groups), rows), row)
        return (
            code.at(packed.data, code.times(_row_of(code, packed, layer, row), half_row)),
            code.at(scales.data, code.times(first, size)),
            code.at(zeros.data, first),
            rows,
        )

    def runs(code: Code, of_row: Any, first: Value) -> list[Run]:
        packed, scales, zeros, rows = of_row
        skipped = code.times(code.divided(first, group), rows)
        scale = code.number_of(code.at(scales, code.times(skipped, size)), scale_dtype)
        zero = code.load(code.at(zeros, skipped), BYTE)
        start = code.at(packed, code.divided(first, 2))
        codes = [code.bytes(code.at(start, place), LANES) for place in range(0, group // 2, LANES)]
        # at most 16 off, which a byte holds
        zero = code.splat(zero)
        low = [code.builder.sub(code.masked(part, 15), zero) for part in codes]
        high = [code.builder.sub(code.shifted_down(part, 4), zero) for part in codes]
        return [Run(low + high, scale)]

    return Format(columns=group, num_arrays=3, row=row, runs=runs)


def _blocks(columns: int, nbytes: int, runs: Callable[[Code, Value], list[Run]]) -> Format:
    """Blocks of a GGUF file: uint8 [L, N, K / columns * nbytes]."""

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (data,) = weight
        return code.at(data.data, code.times(_row_of(code, data, layer, row), _dim(code, data, 2)))

    def of_block(code: Code, start: Value, first: Value) -> list[Run]:
        return runs(code, code.at(start, code.times(code.divided(first, columns), nbytes)))

    return Format(columns=columns, num_arrays=1, row=row, runs=of_block)


def _q8_0(code: Code, block: Value) -> list[Run]:
    return [Run(code.parts(code.bytes(code.at(block, 2), 32)), code.half(block))]


def _nibbles(code: Code, start: Value) -> list[Value]:
    """16 bytes as two vectors: the low nibbles, and the high ones."""
    packed = code.bytes(start, 16)
    return [code.masked(packed, 15), code.shifted_down(packed, 4)]


def _q4_0(code: Code, block: Value) -> list[Run]:
    codes = _nibbles(code, code.at(block, 2))
    return [Run([code.less(part, 8) for part in codes], code.half(block))]


def _q4_1(code: Code, block: Value) -> list[Run]:
    codes = _nibbles(code, code.at(block, 4))
    return [Run(codes, code.half(block), code.half(code.at(block, 2)))]


def _fifth_bits(code: Code, start: Value) -> list[Value]:
    """A bit each of 32 numbers, from the lowest of four bytes, in its place: two vectors."""
    return [code.masked(code.bits(code.at(start, 2 * i)), 16) for i in range(2)]


def _q5_0(code: Code, block: Value) -> list[Run]:
    pairs = zip(_nibbles(code, code.at(block, 6)), _fifth_bits(code, code.at(block, 2)), strict=True)
    return [Run([code.less(code.builder.or_(low, high), 16) for low, high in pairs], code.half(block))]


def _q5_1(code: Code, block: Value) -> list[Run]:
    pairs = zip(_nibbles(code, code.at(block, 8)), _fifth_bits(code, code.at(block, 4)), strict=True)
    values = [code.builder.or_(low, high) for low, high in pairs]
    return [Run(values, code.half(block), code.half(code.at(block, 2)))]


def _affine_k(code: Code, block: Value, codes: Callable[[int], Value]) -> list[Run]:
    """Eight runs of 32 codes, whose scales and minima of six bits are packed in 12 bytes (`gguf_blocks`)."""
    d, dmin = code.half(block), code.negated(code.half(code.at(block, 2)))
    first, second, third = ([code.byte(code.at(block, 4 * part + i)) for i in range(4)] for part in (1, 2, 3))

    def joined(low: Value, high: Value) -> Value:
        return code.builder.or_(low, code.shifted_up(code.shifted_down(high, 6), 4))

    scales = [code.masked(byte, 63) for byte in first]
    scales += [joined(code.masked(third[i], 15), first[i]) for i in range(4)]
    minima = [code.masked(byte, 63) for byte in second]
    minima += [joined(code.shifted_down(third[i], 4), second[i]) for i in range(4)]
    return [
        Run(
            code.parts(codes(i)),
            code.multiplied(d, code.unsigned(scales[i])),
            code.multiplied(dmin, code.unsigned(minima[i])),
        )
        for i in range(8)
    ]


def _low_of_k(code: Code, start: Value, i: int) -> Value:
    """The nibbles of run i: each 32 bytes hold a run in low and one in high ones."""
    packed = code.bytes(code.at(start, 32 * (i // 2)), 32)
    return code.shifted_down(packed, 4) if i % 2 else code.masked(packed, 15)


def _q4_k(code: Code, block: Value) -> list[Run]:
    return _affine_k(code, block, lambda i: _low_of_k(code, code.at(block, 16), i))


def _q5_k(code: Code, block: Value) -> list[Run]:
    high = code.bytes(code.at(block, 16), 32)

    def codes(i: int) -> Value:
        fifth = code.shifted_up(code.masked(code.shifted_down(high, i), 1), 4)
        return code.builder.or_(_low_of_k(code, code.at(block, 48), i), fifth)

    return _affine_k(code, block, codes)


def _q6_k(code: Code, block: Value) -> list[Run]:
    d, runs = code.half(code.at(block, 208)), []
    for half in range(2):
        high = code.bytes(code.at(block, 128 + 32 * half), 32)
        for quarter in range(4):
            low = code.bytes(code.at(block, 64 * half + 32 * (quarter % 2)), 32)
            low = code.shifted_down(low, 4) if quarter // 2 else code.masked(low, 15)
            upper = code.shifted_up(code.masked(code.shifted_down(high, 2 * quarter), 3), 4)
            for i, part in enumerate(code.parts(code.less(code.builder.or_(low, upper), 32))):
                scale = code.load(code.at(block, 192 + 8 * half + 2 * quarter + i), BYTE)
                runs.append(Run([part], code.multiplied(d, code.signed(scale))))
    return runs


def _two_bits(code: Code, start: Value) -> list[Value]:
    """256 numbers of two bits, eight vectors of 32: each half has 32 bytes, whose pairs of bits hold its values 0-31,
    32-63, 64-95 and 96-127.
    """
    found = []
    for half in range(2):
        packed = code.bytes(code.at(start, 32 * half), 32)
        found += [code.masked(code.shifted_down(packed, 2 * quarter), 3) for quarter in range(4)]
    return found


def _q2_k(code: Code, block: Value) -> list[Run]:
    d, dmin = code.half(code.at(block, 80)), code.negated(code.half(code.at(block, 82)))
    runs = []
    for i, values in enumerate(_two_bits(code, code.at(block, 16))):
        for j, part in enumerate(code.parts(values)):
            byte = code.byte(code.at(block, 2 * i + j))
            scale, minimum = code.unsigned(code.masked(byte, 15)), code.unsigned(code.shifted_down(byte, 4))
            runs.append(Run([part], code.multiplied(d, scale), code.multiplied(dmin, minimum)))
    return runs


def _q3_k(code: Code, block: Value) -> list[Run]:
    d, mask, runs = code.half(code.at(block, 108)), code.bytes(block, 32), []
    for i, low in enumerate(_two_bits(code, code.at(block, 32))):
        third = code.shifted_up(code.masked(code.shifted_down(mask, i), 1), 2)
        for j, part in enumerate(code.parts(code.less(code.builder.or_(low, third), 4))):
            number = 2 * i + j
            byte, upper = (code.byte(code.at(block, 96 + at)) for at in (number % 8, 8 + number % 4))
            own = code.shifted_down(byte, 4) if number >= 8 else code.masked(byte, 15)
            high = code.masked(code.shifted_down(upper, 2 * (number // 4)), 3)
            scale = code.less(code.builder.or_(own, code.shifted_up(high, 4)), 32)
            runs.append(Run([part], code.multiplied(d, code.signed(scale))))
    return runs


def _of_table(code: Code, table: tuple[int, ...], start: Value) -> list[Value]:
    return [code.looked_up(table, codes) for codes in _nibbles(code, start)]


def _iq4_nl(code: Code, block: Value) -> list[Run]:
    return [Run(_of_table(code, IQ4_TABLE, code.at(block, 2)), code.half(block))]


def _iq4_xs(code: Code, block: Value) -> list[Run]:
    d, runs = code.half(block), []
    for i in range(8):
        low, high = (code.byte(code.at(block, at)) for at in (4 + i // 2, 2 + i // 4))
        low = code.shifted_down(low, 4) if i % 2 else code.masked(low, 15)
        high = code.masked(code.shifted_down(high, 2 * (i % 4)), 3)
        scale = code.less(code.builder.or_(low, code.shifted_up(high, 4)), 32)
        values = _of_table(code, IQ4_TABLE, code.at(block, 8 + 16 * i))
        runs.append(Run(values, code.multiplied(d, code.signed(scale))))
    return runs


def _mxfp4(code: Code, block: Value) -> list[Run]:
    scale = code.multiplied(_power_of_two(code, code.byte(block)), ir.Constant(FLOAT, 0.5))
    return [Run(_of_table(code, E2M1_DOUBLED, code.at(block, 1)), scale)]


def _row_of(code: Code, array: Operand, layer: Value, row: Value) -> Value:
    """Of an array [L, N, ...]: the number of a row, counted through all layers."""
    return code.add(code.times(layer, _dim(code, array, 1)), row)


def _dim(code: Code, array: Operand, axis: int) -> Value:
    return code.load(code.at(array.dims, 8 * axis), code.number(0).type)


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
    "Q8_0": _blocks(32, 34, _q8_0),
    "Q4_0": _blocks(32, 18, _q4_0),
    "Q4_1": _blocks(32, 20, _q4_1),
    "Q5_0": _blocks(32, 22, _q5_0),
    "Q5_1": _blocks(32, 24, _q5_1),
    "Q4_K": _blocks(256, 144, _q4_k),
    "Q5_K": _blocks(256, 176, _q5_k),
    "Q6_K": _blocks(256, 210, _q6_k),
    "Q2_K": _blocks(256, 84, _q2_k),
    "Q3_K": _blocks(256, 110, _q3_k),
    "IQ4_NL": _blocks(32, 18, _iq4_nl),
    "IQ4_XS": _blocks(256, 136, _iq4_xs),
    "MXFP4": _blocks(32, 17, _mxfp4),
}
