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

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, HALF_WORD, LANES, POINTER, WORD, Code, Value
from pallas_kernels.gguf_blocks import E2M1_DOUBLED, IQ4_TABLE


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring columns that share a scale: ``w = scale * values + minimum``, or ``w = scale * factors * values +
    minimum * minima`` with integers of equal parts of them.
    """

    #: vectors of `WIDTH` integers, i8 or i16; of a format of `FLOATS` of `LANES` float32
    values: list[Value]
    #: float32; None: 1
    scale: Value | None = None
    #: float32; None: 0
    minimum: Value | None = None
    #: <parts x i16>, whose products with values are 4096 in size at most, so that 32 bits hold those of
    #: `Rounded`; None: 1
    factors: Value | None = None
    #: <parts x i16>; None: 1
    minima: Value | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One way in which weights lie."""

    #: columns that the kernel takes at once
    columns: int
    #: arrays of a weight
    num_arrays: int
    #: (code, operands of the weight, layer, row, columns of a row) -> what `run` needs of a row
    row: Callable[[Code, list[Operand], Value, Value, Value], Any]
    #: (code, what `row` gave, a column, how many columns behind it) -> the next `columns`
    run: Callable[[Code, Any, Value, int], Run]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a kernel was given."""

    data: Value
    dims: Value


#: integers of a vector
WIDTH = 32
#: bytes between what is read and what is asked for: by itself no processor goes on beyond a page
AHEAD = 4096

#: (code, address) -> the next 32 numbers there, as a run's values
Numbers = Callable[[Code, Value], list[Value]]


def operand(code: Code, table: Value, i: int) -> Operand:
    """An array of a kernel's table (`cpu_ffi.work_sharing`)."""
    return Operand(code.load(code.at(table, 16 * i), POINTER), code.load(code.at(table, 16 * i + 8), POINTER))


def floats(code: Code, run: Run) -> list[Value]:
    """A run's values as float32 vectors of `LANES`."""
    if run.values[0].type.element == FLOAT:
        return run.values
    return [part for values in run.values for part in code.parts(code.signed(values))]


def parts(code: Code, run: Run) -> list[Run]:
    """A run as runs without factors, of float32 vectors of `LANES`."""
    values = floats(code, run)
    if run.factors is None:
        return [dataclasses.replace(run, values=values)]
    count: int = run.factors.type.count
    scales, minima = (
        [None] * count
        if factors is None
        else code.numbers(code.multiplied(code.signed(factors), code.splat(by, count)))
        for factors, by in ((run.factors, run.scale), (run.minima, run.minimum))
    )
    each = len(values) // count
    return [Run(values[i * each : (i + 1) * each], scales[i], minima[i]) for i in range(count)]


def _reached(code: Code, start: Value, offset: int, nbytes: int) -> Value:
    """The address `offset` bytes behind `start`, from which `nbytes` are read, and as many as far ahead asked for."""
    for line in range(-(-offset // 64) * 64, offset + nbytes, 64):
        code.prefetch(code.at(start, AHEAD + line))
    return code.at(start, offset)


def _plain(size: int, numbers: Numbers, factor: float | None = None) -> Format:
    """Numbers of `size` bytes [L, N, K]. Where a row has one scale, that is a factor of the result.

    Args:
        numbers: of them.
        factor: what they have to be multiplied by.
    """

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (values,) = weight
        return code.at(values.data, code.times(_row_of(code, values, layer, row), code.times(columns, size)))

    def run(code: Code, start: Value, first: Value, behind: int) -> Run:
        here = _reached(code, code.at(start, code.times(first, size)), behind * size, WIDTH * size)
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
        number = _row_of(code, values, layer, row)
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
        here = _reached(code, code.at(start, first), behind, group)
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
        number = _row_of(code, packed, layer, row)
        return (
            code.at(packed.data, code.times(number, code.divided(columns, 2))),
            code.at(scales.data, code.times(code.times(number, code.divided(columns, group)), size)),
            code.floats(table.data),
        )

    def run(code: Code, of_row: Any, first: Value, behind: int) -> Run:
        packed, scales, table = of_row
        at = code.at(scales, code.times(code.add(code.divided(first, group), behind // group), size))
        scale = code.load(at, FLOAT, align=4) if size == 4 else _power_of_two(code, code.byte(at))
        start = _reached(code, code.at(packed, code.divided(first, 2)), behind // 2, group // 2)
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
    number = _row_of(code, packed, layer, row)
    return (
        code.at(packed.data, code.times(number, code.divided(columns, 2))),
        code.at(scales.data, code.times(number, code.divided(columns, 16))),
        # of scales come 256ths
        code.multiplied(code.floats(table.data), code.splat(ir.Constant(FLOAT, 256.0))),
    )


def _run_of_small_groups(code: Code, of_row: Any, first: Value, behind: int) -> Run:
    """Each number with its scale, whose product is exact: of e2m1 and e4m3 it has six bits."""
    packed, scales, table = of_row
    start = _reached(code, code.at(packed, code.divided(first, 2)), behind // 2, 8 * _GROUPS_AT_ONCE)
    of_groups = code.e4m3(code.at(code.at(scales, code.divided(first, 16)), behind // 16), _GROUPS_AT_ONCE)
    of_groups = code.numbers(code.builder.fpext(of_groups, ir.VectorType(FLOAT, _GROUPS_AT_ONCE)))
    codes: list[Value] = []
    for place in range(0, 8 * _GROUPS_AT_ONCE, LANES):
        # the low and the high ones of two groups
        both = code.joined(*_nibbles(code, code.at(start, place)))
        codes += [code.picked(both, [*range(at, at + 8), *range(LANES + at, LANES + at + 8)]) for at in (0, 8)]
    return Run(
        [
            code.multiplied(code.looked_up_floats(table, part), code.splat(scale))
            for part, scale in zip(codes, of_groups, strict=True)
        ]
    )


def _power_of_two(code: Code, exponent: Value) -> Value:
    """float32 2 ** (e - 127) of an i32 0..255: its bits, but for 0, which is subnormal."""
    is_zero = code.builder.icmp_unsigned("==", exponent, code.all(0, exponent))
    bits = code.builder.select(is_zero, code.all(1 << 22, exponent), code.shifted_up(exponent, 23))
    return code.builder.bitcast(bits, FLOAT)


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
        rows = _dim(code, packed, 1)
        first = code.add(code.times(code.times(layer, groups), rows), row)
        return (
            code.at(packed.data, code.times(_row_of(code, packed, layer, row), half_row)),
            code.at(scales.data, code.times(first, size)),
            code.at(zeros.data, first),
            rows,
        )

    def run(code: Code, of_row: Any, first: Value, behind: int) -> Run:
        packed, scales, zeros, rows = of_row
        skipped = code.times(code.add(code.divided(first, group), behind // group), rows)
        scale = code.number_of(code.at(scales, code.times(skipped, size)), scale_dtype)
        zero = code.load(code.at(zeros, skipped), BYTE)
        start = _reached(code, code.at(packed, code.divided(first, 2)), behind // 2, group // 2)
        # the low ones of a group, then the high ones
        low, high = zip(*(_nibbles(code, code.at(start, place)) for place in range(0, group // 2, LANES)), strict=True)
        codes = [*low, *high]
        # at most 16 off, which a byte holds
        zero = code.splat(zero, WIDTH)
        values = [code.joined(*codes[i : i + 2]) for i in range(0, len(codes), 2)]
        return Run([code.builder.sub(part, zero) for part in values], scale)

    return Format(columns=group, num_arrays=3, row=row, run=run)


def _blocks(columns: int, nbytes: int, run: Callable[[Code, Value], Run]) -> Format:
    """Blocks of a GGUF file: uint8 [L, N, K / columns * nbytes]."""

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (data,) = weight
        return code.at(data.data, code.times(_row_of(code, data, layer, row), _dim(code, data, 2)))

    def of_block(code: Code, start: Value, first: Value, behind: int) -> Run:
        here = code.at(start, code.times(code.divided(first, columns), nbytes))
        return run(code, _reached(code, here, behind // columns * nbytes, nbytes))

    return Format(columns=columns, num_arrays=1, row=row, run=of_block)


def _q8_0(code: Code, block: Value) -> Run:
    return Run(_bytes(code, code.at(block, 2)), code.half(block))


def _nibbles(code: Code, start: Value) -> list[Value]:
    """16 bytes as two vectors: the low nibbles, and the high ones."""
    packed = code.bytes(start, 16)
    return [code.masked(packed, 15), code.shifted_down(packed, 4)]


def _codes(code: Code, start: Value) -> Value:
    """16 bytes as one vector: the low nibbles, then the high ones."""
    return code.joined(*_nibbles(code, start))


def _q4_0(code: Code, block: Value) -> Run:
    return Run([code.less(_codes(code, code.at(block, 2)), 8)], code.half(block))


def _q4_1(code: Code, block: Value) -> Run:
    return Run([_codes(code, code.at(block, 4))], code.half(block), code.half(code.at(block, 2)))


def _five_bits(code: Code, nibbles: Value, fifths: Value) -> Value:
    """32 numbers of whose fifth bits four bytes have one each, from the lowest."""
    bits = [code.masked(code.bits(code.at(fifths, 2 * i)), 16) for i in range(2)]
    return code.builder.or_(_codes(code, nibbles), code.joined(*bits))


def _q5_0(code: Code, block: Value) -> Run:
    codes = _five_bits(code, code.at(block, 6), code.at(block, 2))
    return Run([code.less(codes, 16)], code.half(block))


def _q5_1(code: Code, block: Value) -> Run:
    codes = _five_bits(code, code.at(block, 8), code.at(block, 4))
    return Run([codes], code.half(block), code.half(code.at(block, 2)))


def _affine_k(code: Code, block: Value, values: list[Value]) -> Run:
    """Eight parts of 32 codes, whose scales and minima of six bits are packed in 12 bytes (`gguf_blocks`), which are
    taken four at a time.
    """
    d, dmin = code.half(block), code.negated(code.half(code.at(block, 2)))
    first, second, third = (code.load(code.at(block, at), WORD, align=1) for at in (4, 8, 12))

    def whole(low: Value, rest: Value) -> Value:
        upper = code.masked(code.shifted_down(low, 2), 0x30303030)
        high = code.builder.or_(code.masked(rest, 0x0F0F0F0F), upper)
        four = ir.VectorType(BYTE, 4)
        lower = code.builder.bitcast(code.masked(low, 0x3F3F3F3F), four)
        return code.widened(code.joined(lower, code.builder.bitcast(high, four)), HALF_WORD)

    return Run(values, d, dmin, whole(first, third), whole(second, code.shifted_down(third, 4)))


def _wide(code: Code, start: Value) -> Value:
    """32 bytes, as integers of 16 bits: to be taken apart with less than as bytes."""
    return code.builder.zext(code.bytes(start, WIDTH), ir.VectorType(HALF_WORD, WIDTH))


def _nibbles_of_k(code: Code, start: Value) -> list[Value]:
    """Eight vectors of four bits: each 32 bytes hold one in low and one in high nibbles."""
    packed = [_wide(code, code.at(start, 32 * i)) for i in range(4)]
    return [part for each in packed for part in (code.masked(each, 15), code.shifted_down(each, 4))]


def _q4_k(code: Code, block: Value) -> Run:
    return _affine_k(code, block, _nibbles_of_k(code, code.at(block, 16)))


def _q5_k(code: Code, block: Value) -> Run:
    fifths = code.shifted_up(_wide(code, code.at(block, 16)), 4)
    values = [
        code.builder.or_(low, code.masked(code.shifted_down(fifths, i), 16))
        for i, low in enumerate(_nibbles_of_k(code, code.at(block, 48)))
    ]
    return _affine_k(code, block, values)


def _q6_k(code: Code, block: Value) -> Run:
    values = []
    for half in range(2):
        high = code.shifted_up(_wide(code, code.at(block, 128 + 32 * half)), 4)
        first, second = (_wide(code, code.at(block, 64 * half + at)) for at in (0, 32))
        low = [*(code.masked(each, 15) for each in (first, second))]
        low += [code.shifted_down(each, 4) for each in (first, second)]
        for quarter in range(4):
            upper = code.masked(code.shifted_down(high, 2 * quarter), 0x30)
            values.append(code.less(code.builder.or_(low[quarter], upper), 32))
    factors = code.widened(code.bytes(code.at(block, 192), 16), HALF_WORD)
    return Run(values, code.half(code.at(block, 208)), factors=factors)


def _two_bits(code: Code, start: Value) -> list[Value]:
    """256 numbers of two bits, eight vectors: each half has 32 bytes, whose pairs of bits hold its values 0-31, 32-63,
    64-95 and 96-127.
    """
    halves = [_wide(code, code.at(start, 32 * half)) for half in range(2)]
    return [code.masked(code.shifted_down(half, 2 * quarter), 3) for half in halves for quarter in range(4)]


def _q2_k(code: Code, block: Value) -> Run:
    d, dmin = code.half(code.at(block, 80)), code.negated(code.half(code.at(block, 82)))
    packed = code.bytes(block, 16)
    factors, minima = (
        code.widened(part, HALF_WORD) for part in (code.masked(packed, 15), code.shifted_down(packed, 4))
    )
    return Run(_two_bits(code, code.at(block, 16)), d, dmin, factors, minima)


def _q3_k(code: Code, block: Value) -> Run:
    mask, values = code.shifted_up(_wide(code, block), 2), []
    for i, low in enumerate(_two_bits(code, code.at(block, 32))):
        third = code.masked(code.shifted_down(mask, i), 4)
        values.append(code.less(code.builder.or_(low, third), 4))
    own, upper = code.bytes(code.at(block, 96), 8), code.bytes(code.at(block, 104), 4)
    own = code.joined(code.masked(own, 15), code.shifted_down(own, 4))
    pairs = [code.masked(code.shifted_down(upper, 2 * i), 3) for i in range(4)]
    high = code.joined(code.joined(*pairs[:2]), code.joined(*pairs[2:]))
    factors = code.less(code.builder.or_(own, code.shifted_up(high, 4)), 32)
    return Run(values, code.half(code.at(block, 108)), factors=code.widened(factors, HALF_WORD))


def _of_table(code: Code, table: tuple[int, ...], start: Value) -> list[Value]:
    return [code.joined(*(code.looked_up(table, codes) for codes in _nibbles(code, start)))]


def _iq4_nl(code: Code, block: Value) -> Run:
    return Run(_of_table(code, IQ4_TABLE, code.at(block, 2)), code.half(block))


def _iq4_xs(code: Code, block: Value) -> Run:
    values = [part for i in range(8) for part in _of_table(code, IQ4_TABLE, code.at(block, 8 + 16 * i))]
    words = ir.VectorType(WORD, 8)
    low = code.splat(code.load(code.at(block, 4), WORD, align=1), 8)
    high = code.splat(code.builder.zext(code.load(code.at(block, 2), HALF_WORD, align=2), WORD), 8)
    low = code.masked(code.builder.lshr(low, ir.Constant(words, [4 * i for i in range(8)])), 15)
    high = code.masked(code.builder.lshr(high, ir.Constant(words, [2 * i for i in range(8)])), 3)
    factors = code.less(code.builder.or_(low, code.shifted_up(high, 4)), 32)
    factors = code.builder.trunc(factors, ir.VectorType(HALF_WORD, 8))
    return Run(values, code.half(block), factors=factors)


def _mxfp4(code: Code, block: Value) -> Run:
    scale = code.multiplied(_power_of_two(code, code.byte(block)), ir.Constant(FLOAT, 0.5))
    return Run(_of_table(code, E2M1_DOUBLED, code.at(block, 1)), scale)


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
