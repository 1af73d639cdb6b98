"""The kernels of a product of rows with a packed weight, as LLVM code; the same for every format (`formats`).

Operands: x [M, K] in a form of `INPUTS`; layer i32 []; the weight's arrays, of all layers, read where they lie; the
result, float32 [M, N]. Where rows have matrices of their own ("grouped_") layer is i32 [M], -1 for none. A row of the
weight is multiplied by some rows of x at a time: a run's numbers are made in registers, once for these rows, and
multiplied and added up in lanes, which are added to each other in the end. What is added to what depends on the format
alone, and not on how many rows there are, so a row's result has the same bits beside any others. What multiplies many
rows is told in `widened`.
"""

from __future__ import annotations

import abc
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, HALF_WORD, LANES, LONG, POINTER, WORD, Code, Value, has_wide_pairs
from pallas_kernels.packed_matmul.formats import FORMATS, Format, Operand, Run, floats, operand
from pallas_kernels.packed_matmul.widened import widened

#: rows of x that are multiplied at once by one row of the weight, most first: what registers hold. Rows of the weight
#: come one after the other, as they lie: four at a time took 1.5 times as long to read (int8, Zen 3)
TILES = (4, 2, 1)
#: columns of x that share a scale where they are rounded
GROUP = 32
#: the beginning of the names of kernels whose rows have matrices of their own
GROUPED = "grouped_"


class Inputs(abc.ABC):
    """A form of x, and how a sum of products with it is kept: a few values, which go from run to run."""

    #: arrays that x is
    arrays: int

    @abc.abstractmethod
    def row(self, code: Code, x: list[Operand], row: Value, columns: Value) -> Any:
        """What `add` needs of a row of x."""

    @abc.abstractmethod
    def zero(self) -> list[Value]:
        """An empty sum."""

    @abc.abstractmethod
    def numbers(self, code: Code, run: Run) -> list[Value]:
        """A run's numbers as `add` takes them."""

    @abc.abstractmethod
    def add(
        self, code: Code, total: list[Value], row: Any, first: Value, run: Run, numbers: list[Value]
    ) -> list[Value]:
        """The sum with the products of a run, which begins at a column of the weight."""

    @abc.abstractmethod
    def result(self, code: Code, total: list[Value]) -> Value:
        """The sum as one float32 number."""


class Exact(Inputs):
    """x float32 [M, K], multiplied as it is."""

    arrays = 1

    def row(self, code: Code, x: list[Operand], row: Value, columns: Value) -> Any:
        return code.at(x[0].data, code.times(code.times(row, columns), 4))

    def zero(self) -> list[Value]:
        return [_zeros(LANES)]

    def numbers(self, code: Code, run: Run) -> list[Value]:
        return floats(code, run)

    def add(
        self, code: Code, total: list[Value], row: Any, first: Value, run: Run, numbers: list[Value]
    ) -> list[Value]:
        (lanes,), start = total, code.at(row, code.times(first, 4))
        x = [code.floats(code.at(start, 4 * LANES * i)) for i in range(len(numbers))]
        products = code.multiplied(x[0], numbers[0])
        for part, values in zip(x[1:], numbers[1:], strict=True):
            products = code.multiply_add(part, values, products)
        if run.scale is None:
            return [code.summed(lanes, products)]
        lanes = code.multiply_add(products, code.splat(run.scale), lanes)
        if run.minimum is not None:
            alone = x[0]
            for part in x[1:]:
                alone = code.summed(alone, part)
            lanes = code.multiply_add(alone, code.splat(run.minimum), lanes)
        return [lanes]

    def result(self, code: Code, total: list[Value]) -> Value:
        return code.sum_of(total[0])


class Rounded(Inputs):
    """x in 16 bits: int16 [M, K], and of each `GROUP` columns the scale and the sum (of what it stands for), float32
    [M, K / GROUP]. Products of integers are exact, two of them and their sum one instruction, of a whole `GROUP` where
    the processor has it.
    """

    arrays = 3

    def row(self, code: Code, x: list[Operand], row: Value, columns: Value) -> Any:
        first = code.times(row, columns)
        group = code.times(code.divided(first, GROUP), 4)
        return code.at(x[0].data, code.times(first, 2)), code.at(x[1].data, group), code.at(x[2].data, group)

    def zero(self) -> list[Value]:
        return [_zeros(LANES), _zeros(LANES // 2), ir.Constant(FLOAT, 0.0)]

    def numbers(self, code: Code, run: Run) -> list[Value]:
        parts = run.values
        if has_wide_pairs() and len(parts) * LANES % GROUP == 0:
            parts = [code.joined(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return [code.widened(part, HALF_WORD) for part in parts]

    def add(
        self, code: Code, total: list[Value], row: Any, first: Value, run: Run, numbers: list[Value]
    ) -> list[Value]:
        (values, scales, sums), (*lanes, minima) = row, total
        # numbers of a vector, lanes of their pairs, and which of the sums has as many
        size = numbers[0].type.count
        count, own = size // 2, 0 if size // 2 == LANES else 1
        together = min(GROUP // size, len(numbers))
        products = None
        for i in range(0, len(numbers), together):
            column = code.add(first, size * i)
            start = code.at(values, code.times(column, 2))
            inputs = [code.half_words(code.at(start, 2 * size * j), size) for j in range(together)]
            whole = self._products(code, numbers[i : i + together], inputs)
            group = code.times(code.divided(column, GROUP), 4)
            scale = code.load(code.at(scales, group), FLOAT, align=4)
            if run.scale is None:
                lanes[own] = code.multiply_add(whole, code.splat(scale, count), lanes[own])
            elif len(numbers) == together:
                lanes[own] = code.multiply_add(whole, code.splat(code.multiplied(scale, run.scale), count), lanes[own])
            elif products is None:
                products = code.multiplied(whole, code.splat(scale, count))
            else:
                products = code.multiply_add(whole, code.splat(scale, count), products)
            if run.minimum is not None and together * size == GROUP:
                of_group = code.load(code.at(sums, group), FLOAT, align=4)
                minima = code.multiply_add(of_group, run.minimum, minima)
            elif run.minimum is not None:  # of fewer columns than x has sums for
                ones = [code.all(1, x) for x in inputs]
                factor = code.splat(code.multiplied(scale, run.minimum), count)
                lanes[own] = code.multiply_add(self._products(code, ones, inputs), factor, lanes[own])
        if products is not None:
            lanes[own] = code.multiply_add(products, code.splat(run.scale, count), lanes[own])
        return [*lanes, minima]

    @staticmethod
    def _products(code: Code, numbers: list[Value], inputs: list[Value]) -> Value:
        """Sums of pairs of products, float32."""
        whole = code.pairs(numbers[0], inputs[0])
        for number, x in zip(numbers[1:], inputs[1:], strict=True):
            whole = code.builder.add(whole, code.pairs(number, x))
        return code.signed(whole)

    def result(self, code: Code, total: list[Value]) -> Value:
        wide, narrow, minima = total
        halves = [code.part(wide, first, LANES // 2) for first in (0, LANES // 2)]
        return code.summed(code.sum_of(code.summed(code.summed(*halves), narrow)), minima)


#: by the prefix of a kernel's name
INPUTS: dict[str, Inputs] = {"exact": Exact(), "rounded": Rounded()}


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`: "exact_Q8_0", "grouped_rounded_int8" or "wide_Q8_0", for example."""
    prefix, _, form_name = name.removeprefix(GROUPED).partition("_")
    made, form = ir.Module(name=name), FORMATS[form_name]
    if prefix == "wide":
        widened(made, form)
        return made
    inputs = INPUTS[prefix]
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table = code.arguments[0]
    num_x = code.load(operand(code, table, 0).dims, LONG)
    tiles = {size: _tile(made, inputs, form, size, by_row=name.startswith(GROUPED)) for size in TILES}
    if name.startswith(GROUPED):
        _by_groups(
            code,
            tiles,
            operand(code, table, inputs.arrays),
            num_x,
            operand(code, table, inputs.arrays + 1 + form.num_arrays),
        )
    else:
        done: Value = code.number(0)
        for size in TILES:
            behind = code.add(code.times(code.divided(code.subtract(num_x, done), size), size), done)
            with code.loop(done, behind, size) as rows:
                _multiply(code, tiles[size], rows.index)
            done = behind
    code.end()
    return made


def _multiply(code: Code, tile: ir.Function, row: Value) -> None:
    """The rows of x from one on by all rows of the weight that are asked for."""
    table, begin, end = code.arguments
    with code.loop(begin, end, 1) as columns:
        code.builder.call(tile, [table, row, columns.index])


def _by_groups(code: Code, tiles: dict[int, ir.Function], places: Operand, num_x: Value, result: Operand) -> None:
    """Each row of x by the matrix at its own place, as many at once as have the same; rows without one give zeros."""
    builder = code.builder
    _, begin, end = code.arguments

    def place(row: Value) -> Value:
        return code.load(code.at(places.data, code.times(row, 4)), WORD)

    # the rows in front of the carried number have been multiplied
    with code.loop(code.number(0), num_x, 1, [code.number(0)]) as rows:
        own = place(rows.index)
        count: Value = code.number(1)
        for size in TILES[-2::-1]:
            behind = code.add(rows.index, size)
            fits = builder.icmp_signed("<=", behind, num_x)
            last = place(builder.select(fits, code.subtract(behind, 1), rows.index))
            same = builder.and_(fits, builder.icmp_signed("==", own, last))
            count = builder.select(same, code.number(size), count)
        comes = builder.icmp_signed(">=", rows.index, rows.values[0])
        rows.next[0] = builder.select(comes, code.add(rows.index, count), rows.values[0])
        has_one = builder.icmp_signed(">=", own, code.all(0, own))
        for size in TILES:
            wanted = builder.and_(builder.and_(comes, has_one), builder.icmp_signed("==", count, code.number(size)))
            with builder.if_then(wanted):
                _multiply(code, tiles[size], rows.index)
        with builder.if_then(builder.not_(has_one)), code.loop(begin, end, 1) as column:
            to = code.add(code.times(rows.index, code.load(code.at(result.dims, 8), LONG)), column.index)
            code.store(ir.Constant(FLOAT, 0.0), code.at(result.data, code.times(to, 4)))


def _tile(made: ir.Module, inputs: Inputs, form: Format, size: int, *, by_row: bool) -> ir.Function:
    """A function (table, first row of x, row of the weight) that computes the products of some rows of x.

    Args:
        by_row: whether each row of x has a number of a layer.
    """
    code = Code(made, f"tile_{size}", [POINTER, LONG, LONG])
    table, first, row = code.arguments
    x = [operand(code, table, i) for i in range(inputs.arrays)]
    number = operand(code, table, inputs.arrays)
    weight = [operand(code, table, inputs.arrays + 1 + i) for i in range(form.num_arrays)]
    result = operand(code, table, inputs.arrays + 1 + form.num_arrays)
    columns = code.load(code.at(x[0].dims, 8), LONG)
    at = code.at(number.data, code.times(first, 4)) if by_row else number.data
    layer = code.builder.sext(code.load(at, WORD), LONG)
    x_rows = [inputs.row(code, x, code.add(first, m), columns) for m in range(size)]
    of_row = form.row(code, weight, layer, row, columns)
    width = len(inputs.zero())
    places = [slice(width * m, width * (m + 1)) for m in range(size)]
    with code.loop(code.number(0), columns, form.columns, inputs.zero() * size) as loop:
        column = loop.index
        for run in form.runs(code, of_row, loop.index):
            numbers = inputs.numbers(code, run)
            for x_row, place in zip(x_rows, places, strict=True):
                loop.next[place] = inputs.add(code, loop.next[place], x_row, column, run, numbers)
            column = code.add(column, LANES * len(run.values))
    num_out = code.load(code.at(result.dims, 8), LONG)
    for m, place in enumerate(places):
        at = code.add(code.times(code.add(first, m), num_out), row)
        code.store(inputs.result(code, loop.values[place]), code.at(result.data, code.times(at, 4)))
    code.end()
    return code.function


def _zeros(count: int) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, count), [0.0] * count)
