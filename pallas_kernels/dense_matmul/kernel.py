"""The kernels of a product of rows with a dense weight, as LLVM code.

Operands: x [M, K]; layer i32 []; the weight's stack [L, N, K]; the result, float32 [M, N]. Rows of the weight and of x
both lie along K, and are multiplied in vectors, so nothing has to be packed: a tile keeps a vector of sums for each
number of the result, and adds these up in the end. What is added to what does not depend on the tile, so a row's result
has the same bits whatever other rows there are.
"""

from __future__ import annotations

import abc

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, LONG, POINTER, WORD, Code, Value

#: rows of the weight that are multiplied at once
COLUMNS = (4, 1)
#: rows of x that a row of the weight is multiplied by before the next one is: what a core's own cache holds of them
BLOCK = 32
#: rows of x from which on rows of a bfloat16 weight are widened once for all of them
WIDENED_FROM = 5


class Form(abc.ABC):
    """In which numbers rows are multiplied, and how many rows of x at once, most first: what registers hold."""

    lanes: int
    rows: tuple[int, ...]
    #: bytes of a number
    x_size: int
    weight_size: int

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
        """The sums, <lanes x float>, with the products."""


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
    "bfloat16_few": Floats(16, "bfloat16"),
}


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`, by its name."""
    made, form = ir.Module(name=name), FORMS[name.removeprefix("dense_")]
    widens = isinstance(form, Floats) and form.weight_size == 2
    wide = FORMS[f"float32_{form.lanes}"] if widens else form
    direct = {(m, n): tile(made, form, m, n, f"tile_{m}_{n}") for m in form.rows for n in COLUMNS}
    widened = {(m, n): tile(made, wide, m, n, f"wide_{m}_{n}") for m in form.rows for n in COLUMNS} if widens else {}

    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    builder = code.builder
    table, begin, end = code.arguments
    x, layer, weight, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(4))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 3))
    num_rows, in_features = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result_dims, 8), LONG)
    row_bytes = code.times(in_features, form.weight_size)
    place = code.times(builder.sext(code.load(layer, WORD), LONG), out_features)
    weight = code.at(weight, code.times(place, row_bytes))
    room = code.allocated(code.times(in_features, wide.weight_size * COLUMNS[0])) if widens else None

    def multiply(tiles: dict, n: int, own: Form, rows: tuple[Value, Value], columns: Value, of_weight: Value) -> None:
        """All rows of a block by n rows of the weight."""
        done, stop = rows
        for m in own.rows:
            last = whole(code, done, stop, m)
            with code.loop(done, last, m) as loop:
                of_x = code.at(x, code.times(loop.index, code.times(in_features, own.x_size)))
                to = code.add(code.times(loop.index, out_features), columns)
                builder.call(
                    tiles[m, n], [of_x, of_weight, code.at(result, code.times(to, 4)), in_features, out_features]
                )
            done = last

    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        behind = code.add(blocks.index, BLOCK)
        rows = blocks.index, builder.select(code.below(behind, num_rows), behind, num_rows)
        are_many = code.below(code.number(WIDENED_FROM - 1), code.subtract(rows[1], rows[0]))
        first: Value = begin
        for n in COLUMNS:
            last = whole(code, first, end, n)
            with code.loop(first, last, n) as columns:
                here = code.at(weight, code.times(columns.index, row_bytes))
                if room is None:
                    multiply(direct, n, form, rows, columns.index, here)
                else:
                    with builder.if_else(are_many) as (many, few):
                        with many:
                            _widen(code, form, here, room, code.times(in_features, n))
                            multiply(widened, n, wide, rows, columns.index, room)
                        with few:
                            multiply(direct, n, form, rows, columns.index, here)
            first = last
    if room is not None:
        code.free(room)
    code.end()
    return made


def whole(code: Code, first: Value, end: Value, size: int) -> Value:
    """Behind the last of the whole groups of so many."""
    return code.add(code.times(code.divided(code.subtract(end, first), size), size), first)


def _widen(code: Code, form: Form, weight: Value, to: Value, count: Value) -> None:
    """Write numbers of the weight as float32."""
    with code.loop(code.number(0), count, form.step) as loop:
        numbers = form.weight(code, code.at(weight, code.times(loop.index, form.weight_size)))
        code.store(numbers, code.at(to, code.times(loop.index, 4)))


def tile(made: ir.Module, form: Form, m: int, n: int, name: str) -> ir.Function:
    """A function (rows of x, rows of the weight, their place in the result, in-features, out-features)."""
    code = Code(made, name, [POINTER, POINTER, POINTER, LONG, LONG])
    x, weight, result, in_features, out_features = code.arguments
    xs = [code.at(x, code.times(in_features, i * form.x_size)) for i in range(m)]
    weights = [code.at(weight, code.times(in_features, i * form.weight_size)) for i in range(n)]
    zero = ir.Constant(ir.VectorType(FLOAT, form.lanes), [0.0] * form.lanes)
    with code.loop(code.number(0), in_features, form.step, [zero] * (m * n)) as loop:
        at_weight, at_x = (code.times(loop.index, size) for size in (form.weight_size, form.x_size))
        of_weight = [form.weight(code, code.at(row, at_weight)) for row in weights]
        for i, row in enumerate(xs):
            of_x = form.x(code, code.at(row, at_x))
            for j, other in enumerate(of_weight):
                loop.next[i * n + j] = form.add(code, loop.next[i * n + j], of_x, other)
    sums = code.sums_of(loop.values)
    for i in range(m):
        code.store(code.part(sums, i * n, n), code.at(result, code.times(out_features, 4 * i)))
    code.end()
    return code.function
