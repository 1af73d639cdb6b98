"""Rows of x in 16 bits, for products in integers, as LLVM code.

A scale is a power of two, and belongs to a group of 16 columns: what one lane of a kernel multiplies of a span, two
neighbours of each `WIDTH` columns. It gives a group's largest number 15 bits. So bfloat16's numbers, which have 8, come
out as they are down to a 128th of the largest, and others are off by 2 ** -16 of it at most. XLA may leave out the
rounding of a sum to bfloat16 in front of a kernel, so numbers may have more bits than 15: the few that would be rounded
up to one that has no room become the largest that has.
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, HALF_WORD, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.packed_matmul.runs import WIDTH

#: columns whose groups lie among each other
SPAN = 256
#: the largest integer
_MOST = 2**15 - 1
#: an exponent of float32 whose scale still has a reciprocal, how much lower a scale is, and that of infinities and NaN
_LEAST, _BITS, _NONE = 30, 14, 255


def spans(code: Code, columns: Value) -> Value:
    """How many there are of a row."""
    return code.divided(code.add(columns, SPAN - 1), SPAN)


def rounding(made: ir.Module, sum_columns: int) -> ir.Function:
    """A function (float32 [K], K, int16 [K], scales float32 [spans, LANES], sums float32 [K / sum_columns] of what the
    integers stand for) that reads the first and writes the last three.

    Args:
        sum_columns: 16 or 32; 0: no sums are wanted.
    """
    code = Code(made, "rounded", [POINTER, LONG, POINTER, POINTER, POINTER])
    builder = code.builder
    x, columns, integers, scales, sums = code.arguments
    words, floats = (ir.VectorType(number, LANES) for number in (WORD, FLOAT))

    def parts(column: Value) -> list[Value]:
        start = code.at(x, code.times(column, 4))
        return [code.floats(code.at(start, at)) for at in (0, 4 * LANES)]

    with code.loop(code.number(0), columns, SPAN) as span:
        behind = code.smaller(code.add(span.index, SPAN), columns)
        # the largest of the bits without a sign, whose order is that of the numbers
        with code.loop(span.index, behind, WIDTH, [ir.Constant(words, [0] * LANES)] * 2) as loop:
            found = [code.masked(builder.bitcast(part, words), 0x7FFFFFFF) for part in parts(loop.index)]
            loop.next = [_larger(code, *both) for both in zip(loop.values, found, strict=True)]
        both = code.joined(*loop.values)
        even, odd = (code.picked(both, range(first, WIDTH, 2)) for first in (0, 1))
        exponent = code.shifted_down(_larger(code, even, odd), 23)
        exponent = _larger(code, exponent, code.all(_LEAST, exponent))
        is_none = builder.icmp_unsigned("==", exponent, code.all(_NONE, exponent))
        exponent = code.less(exponent, _BITS)
        scale: Value = builder.bitcast(code.shifted_up(exponent, 23), floats)
        inverse = builder.sub(code.all(254, exponent), exponent)
        inverse: Value = builder.bitcast(code.shifted_up(inverse, 23), floats)
        magic, least, most = (ir.Constant(floats, [1.5 * 2**23 + by] * LANES) for by in (0, -_MOST, _MOST))
        # of a group without numbers the result is none
        nothing = ir.Constant(floats, [float("nan")] * LANES)
        place = code.times(code.divided(span.index, SPAN), 4 * LANES)
        code.store(builder.select(is_none, nothing, scale), code.at(scales, place))
        pairs = [[lane // 2 for lane in range(first, first + LANES)] for first in (0, LANES)]
        with code.loop(span.index, behind, WIDTH) as loop:
            whole = []
            for i, part in enumerate(parts(loop.index)):
                # no bit is left for fractions in this sum, and its lowest ones are the integer's
                nearest = code.multiply_add(part, code.picked(inverse, pairs[i]), magic)
                nearest = code.larger(nearest, least)
                nearest = builder.select(builder.fcmp_ordered("<", nearest, most), nearest, most)
                number = builder.trunc(builder.bitcast(nearest, words), ir.VectorType(HALF_WORD, LANES))
                code.store(number, code.at(code.at(integers, code.times(loop.index, 2)), 2 * LANES * i))
                whole.append(code.multiplied(builder.fsub(nearest, magic), code.picked(scale, pairs[i])))
            if sum_columns:
                each = whole if sum_columns == LANES else [code.summed(*whole)]
                place = code.times(code.divided(loop.index, sum_columns), 4)
                for i, vector in enumerate(each):
                    code.store(code.sum_of(vector), code.at(code.at(sums, place), 4 * i))
    code.end()
    return code.function


def _larger(code: Code, a: Value, b: Value) -> Value:
    """The larger integers of two vectors."""
    return code.builder.select(code.builder.icmp_signed(">", a, b), a, b)
