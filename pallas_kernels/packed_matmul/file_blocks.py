"""The blocks of a GGUF file (`pallas_kernels.gguf_blocks`), as formats of a kernel for CPUs."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, HALF_WORD, WORD, Code, Value
from pallas_kernels.gguf_blocks import E2M1_DOUBLED, IQ4_TABLE
from pallas_kernels.packed_matmul.runs import WIDTH, Format, Operand, Run, dim, nibbles, power_of_two, reached, row_of


def _blocks(columns: int, nbytes: int, run: Callable[[Code, Value], Run]) -> Format:
    """Blocks of a GGUF file: uint8 [L, N, K / columns * nbytes]."""

    def row(code: Code, weight: list[Operand], layer: Value, row: Value, columns: Value) -> Value:
        (data,) = weight
        return code.at(data.data, code.times(row_of(code, data, layer, row), dim(code, data, 2)))

    def of_block(code: Code, start: Value, first: Value, behind: int) -> Run:
        here = code.at(start, code.times(code.divided(first, columns), nbytes))
        return run(code, reached(code, here, behind // columns * nbytes, nbytes))

    return Format(columns=columns, num_arrays=1, row=row, run=of_block)


def _q8_0(code: Code, block: Value) -> Run:
    return Run([code.bytes(code.at(block, 2), WIDTH)], code.half(block))


def _codes(code: Code, start: Value) -> Value:
    """16 bytes as one vector: the low nibbles, then the high ones."""
    return code.joined(*nibbles(code, start))


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
    return [code.joined(*(code.looked_up(table, codes) for codes in nibbles(code, start)))]


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
    scale = code.multiplied(power_of_two(code, code.byte(block)), ir.Constant(FLOAT, 0.5))
    return Run(_of_table(code, E2M1_DOUBLED, code.at(block, 1)), scale)


#: by the name of a kernel, which is that of a kind of block
FILE_BLOCKS: dict[str, Format] = {
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
