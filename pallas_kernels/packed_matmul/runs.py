"""What a kernel for CPUs takes of a packed weight: runs of columns, and a `Format` for each way in which they lie.

A format says which numbers a row of a weight is, in runs of columns: small integers, exact in float32, or float32
numbers, and what they are multiplied with and raised by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.cpu_ffi.vectors import FLOAT, POINTER, Code, Value


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


def reached(code: Code, start: Value, offset: int, nbytes: int) -> Value:
    """The address `offset` bytes behind `start`, from which `nbytes` are read, and as many as far ahead asked for."""
    for line in range(-(-offset // 64) * 64, offset + nbytes, 64):
        code.prefetch(code.at(start, AHEAD + line))
    return code.at(start, offset)


def power_of_two(code: Code, exponent: Value) -> Value:
    """float32 2 ** (e - 127) of an i32 0..255: its bits, but for 0, which is subnormal."""
    is_zero = code.builder.icmp_unsigned("==", exponent, code.all(0, exponent))
    bits = code.builder.select(is_zero, code.all(1 << 22, exponent), code.shifted_up(exponent, 23))
    return code.builder.bitcast(bits, FLOAT)


def nibbles(code: Code, start: Value) -> list[Value]:
    """16 bytes as two vectors: the low nibbles, and the high ones."""
    packed = code.bytes(start, 16)
    return [code.masked(packed, 15), code.shifted_down(packed, 4)]


def row_of(code: Code, array: Operand, layer: Value, row: Value) -> Value:
    """Of an array [L, N, ...]: the number of a row, counted through all layers."""
    return code.add(code.times(layer, dim(code, array, 1)), row)


def dim(code: Code, array: Operand, axis: int) -> Value:
    return code.load(code.at(array.dims, 8 * axis), code.number(0).type)
