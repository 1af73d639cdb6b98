"""Products of a block of rows with rows of a weight, in tiles, as LLVM code: what kernels of dense and of many packed
products share.

A tile keeps a vector of sums for each number of its result, and adds these up in the end. Columns are taken in pieces,
which a core's first cache keeps while all rows of the block are multiplied by them; a tile's sums wait in memory for
the next piece. What is added to what is as if there was one.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value

#: rows of the weight that are multiplied at once
COLUMNS = (4, 1)
#: as many of them, where they are widened and registers have 16 numbers
WIDE_COLUMNS = 8
#: most columns that are multiplied before the next ones are: so many of these rows of the weight, as float32, lie in a
#: core's first cache beside rows of x
PIECE = 640
#: rows of x that a row of the weight is multiplied by before the next one is: what a core's own cache holds of them
BLOCK = 32
#: bytes of a cache line
LINE = 64
#: the first of some rows, and the one behind the last
Rows = tuple[Value, Value]


class Form(abc.ABC):
    """In which numbers rows are multiplied, and how many rows of x at once, most first: what registers hold."""

    lanes: int
    rows: tuple[int, ...]
    #: bytes of a number
    x_size: int
    weight_size: int
    #: of sums
    total: ir.Type = FLOAT

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Columns that are multiplied at once."""

    @abc.abstractmethod
    def x(self, code: Code, address: Value) -> Value:
        """The next `step` numbers of a row of x."""

    @abc.abstractmethod
    def weight(self, code: Code, address: Value) -> Value:
        """Those of a row of the weight."""

    @abc.abstractmethod
    def add(self, code: Code, total: Value, x: Value, weight: Value) -> Value:
        """The sums, <lanes x total>, with the products."""


class Floats(Form):
    """x float32, and the weight float32, or bfloat16 that is widened."""

    x_size = 4

    def __init__(self, lanes: int, weight: str):
        self.lanes, self.weight_size = lanes, 2 if weight == "bfloat16" else 4
        self.rows = (4, 2, 1) if lanes == 16 else (2, 1)

    @property
    def step(self) -> int:
        return self.lanes

    def x(self, code: Code, address: Value) -> Value:
        return code.floats(address, self.lanes)

    def weight(self, code: Code, address: Value) -> Value:
        if self.weight_size == 4:
            return code.floats(address, self.lanes)
        bits = code.builder.zext(code.half_words(address, self.lanes), ir.VectorType(WORD, self.lanes))
        return code.builder.bitcast(code.shifted_up(bits, 16), ir.VectorType(FLOAT, self.lanes))

    def add(self, code: Code, total: Value, x: Value, weight: Value) -> Value:
        return code.multiply_add(x, weight, total)


class Pairs(Form):
    """Both bfloat16, two products and their sum in one instruction (AVX512-BF16)."""

    lanes, rows, x_size, weight_size = 16, (4, 2, 1), 2, 2

    @property
    def step(self) -> int:
        return 2 * self.lanes

    def x(self, code: Code, address: Value) -> Value:
        return code.half_words(address, self.step)

    def weight(self, code: Code, address: Value) -> Value:
        return code.half_words(address, self.step)

    def add(self, code: Code, total: Value, x: Value, weight: Value) -> Value:
        return code.bfloat16_pairs(x, weight, total)


#: by the name of a kernel
FORMS: dict[str, Form] = {
    **{f"{dtype}_{lanes}": Floats(lanes, dtype) for dtype in ("float32", "bfloat16") for lanes in (8, 16)},
    "bfloat16_pairs": Pairs(),
}


def pieces(code: Code, in_features: Value, step: int, most: int = PIECE) -> Value:
    """Columns of each piece of rows, a multiple of `step`, and at most so many: as few pieces as can be, of about equal
    size.
    """
    most = most // step * step
    count = code.divided(code.add(in_features, most - 1), most)
    each = code.divided(code.subtract(code.add(in_features, count), 1), count)
    return code.times(code.divided(code.add(each, step - 1), step), step)


#: (first column, columns) -> where these of some rows of a weight are, and how many numbers from a row to the next
Read = Callable[[Value, Value], tuple[Value, Value]]
#: (first column, which of some rows of a weight, columns, an address): writes these columns there, as float32
Widen = Callable[[Value, int, Value, Value], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where results of a block of rows of x go, and what is read next."""

    #: where those of the first row are written, and how many numbers from a row's to those of the next
    start: Value
    stride: Value
    #: where the rows of the weight are that come next, and the bytes of their numbers: they are asked for
    ahead: tuple[Value, int] | None = None
    #: bytes of a number there: 4, of float32, or 2, of bfloat16; None: 4
    size: Value | None = None


class Products:
    """Writes products of a block of rows of x with some rows of a weight, a piece of their columns after the other.

    Args:
        form: of the rows that are multiplied.
        columns: how many rows of the weight there may be.
        most_parts: parts of the weight that are multiplied by the same rows of x.
    """

    def __init__(
        self,
        made: ir.Module,
        code: Code,
        form: Form,
        x: Value,
        in_features: Value,
        columns: tuple[int, ...],
        name: str,
        most_parts: int,
    ):
        self._code, self._form, self._x, self._in_features = code, form, x, in_features
        self._tiles = {
            (m, n): tile(made, form, m, n, f"{name}_{m}_{n}")
            for n in columns
            for m in form.rows
            if m * n <= form.rows[0] * COLUMNS[0]
        }
        self._size = 4 * form.lanes * BLOCK * columns[0]
        self._sums = code.scratch(self._size // 4 * most_parts)

    def write(self, n: int, rows: Rows, piece: Value, parts: Sequence[tuple[Read, Place]]) -> None:
        """A block of rows by n rows of the weight, of each of some parts of it.

        Args:
            piece: columns of a piece.
        """
        code, form = self._code, self._form
        size = 4 * form.lanes
        with code.loop(code.number(0), self._in_features, piece) as taken:
            first = taken.index
            count = code.smaller(piece, code.subtract(self._in_features, first))
            of_weights = [read(first, count) for read, _ in parts]
            is_first = code.builder.icmp_signed("==", first, code.number(0))
            is_last = code.builder.icmp_signed("==", code.add(first, count), self._in_features)
            done, stop = rows
            for m in (m for m in form.rows if (m, n) in self._tiles):
                last = whole(code, done, stop, m)
                with code.loop(done, last, m) as loop:
                    row = code.subtract(loop.index, rows[0])
                    of_x = code.add(code.times(loop.index, self._in_features), first)
                    x = code.at(self._x, code.times(of_x, form.x_size)), self._in_features
                    for _, place in parts:
                        if place.ahead is not None:
                            self._ask(n, rows, row, m, (first, count), place.ahead)
                    for i, ((_, place), weight) in enumerate(zip(parts, of_weights, strict=True)):
                        kept = code.at(self._sums, code.add(code.times(row, n * size), i * self._size))
                        sums = kept, is_first, is_last
                        number = code.number(4) if place.size is None else place.size
                        start = code.at(place.start, code.times(code.times(row, place.stride), number))
                        to = start, place.stride, number
                        code.builder.call(self._tiles[m, n], [*x, *weight, count, *sums, *to])
                done = last

    def _ask(self, n: int, rows: Rows, row: Value, m: int, piece: Rows, ahead: tuple[Value, int]) -> None:
        """Ask for these rows' share of what comes next: memory is read while a core computes."""
        code, (start, size) = self._code, ahead
        lines = code.times(code.subtract(rows[1], rows[0]), LINE)
        share = code.divided(code.subtract(code.add(code.times(piece[1], n * size), lines), 1), lines)
        line = code.times(row, share)
        start = code.at(start, code.times(piece[0], n * size))
        with code.loop(line, code.add(line, code.times(share, m)), 1) as each:
            code.prefetch(code.at(start, code.times(each.index, LINE)), 2)


class WidenedProducts:
    """Writes products of a block of rows of x with some rows of a weight, which is made float32 once for all of the
    block, a piece of columns at a time.

    Args:
        step: columns come in multiples of it, and so do those of a piece.
    """

    def __init__(
        self, made: ir.Module, code: Code, lanes: int, x: Value, in_features: Value, step: int, most_parts: int = 1
    ):
        #: rows of the weight that are multiplied at once
        self.columns = (WIDE_COLUMNS, *COLUMNS) if lanes == LANES and most_parts == 1 else COLUMNS
        self._code, self._in_features = code, in_features
        self._piece = pieces(code, in_features, step)
        form = FORMS[f"float32_{lanes}"]
        self._products = Products(made, code, form, x, in_features, self.columns, "wide", most_parts)
        self._room = code.scratch(self.columns[0] * PIECE * most_parts)

    def whole(self, first: Value, end: Value, n: int) -> Value:
        """Behind the last of the rows of a weight that are taken in groups of n."""
        last = whole(self._code, first, end, n)
        # rows of one piece are as quick by half as many, which the first cache has twice as much room for
        has_several = self._code.below(self._piece, self._in_features)
        return self._code.builder.select(has_several, last, first) if n == WIDE_COLUMNS else last

    def write(self, n: int, rows: Rows, parts: Sequence[tuple[Widen, Place]]) -> None:
        """A block of rows by n rows of the weight, of each of some parts of it."""
        read = [(self._reader(n, i, widen), place) for i, (widen, place) in enumerate(parts)]
        self._products.write(n, rows, self._piece, read)

    def _reader(self, n: int, part: int, widen: Widen) -> Read:
        code = self._code
        room = code.at(self._room, 4 * PIECE * self.columns[0] * part)

        def read(first: Value, count: Value) -> tuple[Value, Value]:
            for row in range(n):
                widen(first, row, count, code.at(room, code.times(count, 4 * row)))
            return room, count

        return read


def whole(code: Code, first: Value, end: Value, size: int) -> Value:
    """Behind the last of the whole groups of so many."""
    return code.add(code.times(code.divided(code.subtract(end, first), size), size), first)


def write(code: Code, numbers: Value, places: Sequence[Value], size: Value) -> None:
    """Write equal parts of a vector to some places: float32 numbers rounded to bfloat16 where one has 2 bytes there,
    integers as they are.
    """
    count = numbers.type.count // len(places)

    def store(found: Value) -> None:
        for i, place in enumerate(places):
            code.store(code.part(found, i * count, count), place)

    if numbers.type.element != FLOAT:
        store(numbers)
        return
    with code.builder.if_else(code.builder.icmp_signed("==", size, code.number(2))) as (narrow, wide):
        with narrow:
            store(code.rounded(numbers))
        with wide:
            store(numbers)


def tile(made: ir.Module, form: Form, m: int, n: int, name: str) -> ir.Function:
    """A function (rows of x, their stride; rows of the weight, their stride; columns; where sums are kept, whether
    these columns are the first ones, and the last ones; the place of the results, their stride, and bytes of a number
    there); strides in numbers.
    """
    kinds = [POINTER, LONG, POINTER, LONG, LONG, POINTER, ir.IntType(1), ir.IntType(1), POINTER, LONG, LONG]
    code = Code(made, name, kinds)
    x, x_stride, weight, weight_stride, columns, kept, is_first, is_last, result, stride, size = code.arguments
    xs = [code.at(x, code.times(x_stride, i * form.x_size)) for i in range(m)]
    weights = [code.at(weight, code.times(weight_stride, i * form.weight_size)) for i in range(n)]
    vector = ir.VectorType(form.total, form.lanes)
    zero = ir.Constant(vector, None)
    sums: list[Value] = []
    with code.builder.if_else(is_first) as (begins, resumes):
        with begins:
            begin = code.builder.block
        with resumes:
            loaded = [code.load(code.at(kept, 4 * form.lanes * i), vector, align=4) for i in range(m * n)]
            resume = code.builder.block
    for old in loaded:
        total = code.builder.phi(vector)
        total.add_incoming(zero, begin)
        total.add_incoming(old, resume)
        sums.append(total)
    with code.loop(code.number(0), columns, form.step, sums) as loop:
        at_weight, at_x = (code.times(loop.index, size) for size in (form.weight_size, form.x_size))
        of_weight = [form.weight(code, code.at(row, at_weight)) for row in weights]
        for i, row in enumerate(xs):
            of_x = form.x(code, code.at(row, at_x))
            for j, other in enumerate(of_weight):
                loop.next[i * n + j] = form.add(code, loop.next[i * n + j], of_x, other)
    with code.builder.if_else(is_last) as (ends, goes_on):
        with ends:
            row_bytes = code.times(stride, size)
            write(code, code.sums_of(loop.values), [code.at(result, code.times(row_bytes, i)) for i in range(m)], size)
        with goes_on:
            for i, value in enumerate(loop.values):
                code.store(value, code.at(kept, 4 * form.lanes * i))
    code.end()
    return code.function
