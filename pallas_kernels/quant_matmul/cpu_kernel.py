"""The kernels of a product of rows of int8 numbers with a weight of int8 numbers, as LLVM code.

Operands: x, int8 [M, K], or its tiles; layer i32 []; the weight's stack int8 [L, N, K]; scales of its rows [L, N, 1],
and of x's, float32 [M, 1]; the result, float32 [M, N]. Sums are integers, so that there is no order of adding up; they
are multiplied by the weight's scale, and then by x's.

Tiles of Intel's AMX are multiplied by `cpu_tiles`, rows in vectors as those of dense weights
(`dense_matmul.products`). Vectors have an instruction for four products of bytes with a sign by bytes without: the
weight's numbers get 128 more, and 128 times the sum of x's row is taken off in the end. x is rounded before, once for a
launch (`_rounded`).
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul.products import BLOCK, COLUMNS, PIECE, Form, Place, Products, Rows, pieces, whole
from pallas_kernels.dense_matmul.tiles import paired
from pallas_kernels.quant_matmul import cpu_tiles
from pallas_kernels.quant_matmul.cpu_ffi import CODES, FOURS, TILES

#: what is added to the weight's numbers
OFFSET = 128
#: the largest magnitude of what x is rounded to
LARGEST = 127.0
#: most columns that are multiplied before the next ones are: as many bytes as of float32 numbers
PIECE_OF_BYTES = 4 * PIECE


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`, by its name: "int8_bfloat16_16", the scales' dtype and the form."""
    made = ir.Module(name=name)
    if name == FOURS:
        paired(made)
        return made
    kind, _, rest = name.partition("_")
    if kind == CODES:
        _rounded(made, rest)
        return made
    scale_dtype, _, form = rest.partition("_")
    if form == TILES:
        cpu_tiles.multiplied(made, scale_dtype)
    else:
        _multiplied(made, Bytes(int(form)), scale_dtype)
    return made


class Bytes(Form):
    """Both int8, in vectors of as many integers of 32 bits, each of which has four of them."""

    x_size = weight_size = 1
    total = WORD

    def __init__(self, lanes: int):
        self.lanes, self.rows = lanes, (4, 2, 1) if lanes == 16 else (2, 1)
        self._kind = ir.VectorType(WORD, lanes)

    @property
    def step(self) -> int:
        return 4 * self.lanes

    def x(self, code: Code, address: Value) -> Value:
        return code.load(address, self._kind, align=1)

    def weight(self, code: Code, address: Value) -> Value:
        numbers = self.x(code, address)
        return code.builder.xor(numbers, code.all(0x80808080, numbers))

    def add(self, code: Code, total: Value, x: Value, weight: Value) -> Value:
        return code.bytes_by_bytes(weight, x, total)

    def sum(self, code: Code, x: Value, columns: Value) -> Value:
        """The sum of a row of x, i32."""
        zero = ir.Constant(self._kind, [0] * self.lanes)
        with code.loop(code.number(0), columns, self.step, [zero]) as loop:
            numbers = self.x(code, code.at(x, loop.index))
            loop.next[0] = code.bytes_by_bytes(code.all(0x01010101, numbers), numbers, loop.values[0])
        return code.sum_of(loop.values[0])


def _multiplied(made: ir.Module, form: Bytes, scale_dtype: str) -> None:
    """Write the kernel of products in vectors, a function `kernel`, into a module."""
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, layer, weight, scales, x_scales, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(6))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 5))
    num_rows, in_features = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result_dims, 8), LONG)
    first_row = code.times(code.builder.sext(code.load(layer, WORD), LONG), out_features)
    weight = code.at(weight, code.times(first_row, in_features))
    products = Products(made, code, form, x, in_features, COLUMNS, "tile", 1)
    piece = pieces(code, in_features, form.step, PIECE_OF_BYTES)
    scaled = cpu_tiles.Scales(code, scale_dtype, scales, first_row, COLUMNS[0])
    sums, offsets = code.scratch(BLOCK * COLUMNS[0]), code.scratch(BLOCK)

    def stored(column: Value, first: Value) -> Value:
        return code.at(weight, code.add(code.times(column, in_features), first))

    def multiply(n: int, rows: Rows, column: Value) -> None:
        """A block of rows by n rows of the weight."""
        ahead = stored(code.add(column, n), code.number(0)), form.weight_size
        place = Place(sums, code.number(n), ahead)
        products.write(n, rows, piece, [(lambda first, _: (stored(column, first), in_features), place)])
        scaled.take(column, code.number(n))
        of_weight = code.floats(scaled.taken, n)
        with code.loop(rows[0], rows[1], 1) as loop:
            own = code.subtract(loop.index, rows[0])
            numbers = code.load(code.at(sums, code.times(own, 4 * n)), ir.VectorType(WORD, n), align=4)
            offset = code.load(code.at(offsets, code.times(own, 4)), WORD, align=4)
            numbers = code.builder.sub(numbers, code.splat(offset, n))
            of_x = code.splat(code.load(code.at(x_scales, code.times(loop.index, 4)), FLOAT, align=4), n)
            found = code.multiplied(code.multiplied(code.signed(numbers), of_weight), of_x)
            code.store(found, code.at(result, code.times(code.add(code.times(loop.index, out_features), column), 4)))

    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        rows = blocks.index, code.smaller(code.add(blocks.index, BLOCK), num_rows)
        with code.loop(rows[0], rows[1], 1) as loop:
            total = form.sum(code, code.at(x, code.times(loop.index, in_features)), in_features)
            total = code.builder.mul(total, ir.Constant(WORD, OFFSET))
            code.store(total, code.at(offsets, code.times(code.subtract(loop.index, rows[0]), 4)))
        first: Value = begin
        for n in COLUMNS:
            last = whole(code, first, end, n)
            with code.loop(first, last, n) as columns:
                multiply(n, rows, columns.index)
            first = last
    code.end()


def _rounded(made: ir.Module, dtype: str) -> None:
    """Write the kernel that rounds x, a function `kernel`, into a module: `RoundedInputs.rounded`, whose quotients
    are those of IEEE 754; XLA's may be the next number.

    Operands: x [M, K] of a dtype; float32 [], the scale of all rows, or below 0: each has its own; scales, float32 [M];
    numbers, int8 [M, K].
    """
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    builder = code.builder
    table, begin, end = code.arguments
    x, fixed, scales, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(4))
    columns = code.load(code.at(code.load(code.at(table, 8), POINTER), 8), LONG)
    fixed = code.load(fixed, FLOAT)
    vector = ir.VectorType(FLOAT, LANES)
    of = lambda value: ir.Constant(vector, [value] * LANES)  # noqa: E731
    kinds = [vector, vector]
    magnitude = code.declared(f"llvm.fabs.v{LANES}f32", vector, [vector])
    largest = code.declared(f"llvm.maximum.v{LANES}f32", vector, kinds)  # NaN where one of them is
    nearest = code.declared(f"llvm.roundeven.v{LANES}f32", vector, [vector])
    size = 4 if dtype == "float32" else 2
    with code.loop(begin, end, 1) as rows:
        start = code.at(x, code.times(code.times(rows.index, columns), size))
        with code.loop(code.number(0), columns, LANES, [of(0.0)]) as loop:
            numbers = code.numbers_of(code.at(start, code.times(loop.index, size)), dtype)
            loop.next[0] = builder.call(largest, [loop.values[0], builder.call(magnitude, [numbers])])
        found = loop.values[0]
        for width in (8, 4, 2, 1):  # the right half beside the left one
            places = [(i + width) % LANES for i in range(LANES)]
            found = builder.call(largest, [found, code.picked(found, places)])
        own = builder.fdiv(code.numbers(found)[0], ir.Constant(FLOAT, LARGEST))
        scale = builder.select(builder.fcmp_ordered("<", fixed, ir.Constant(FLOAT, 0.0)), own, fixed)
        code.store(scale, code.at(scales, code.times(rows.index, 4)))
        is_zero = builder.fcmp_ordered("==", scale, ir.Constant(FLOAT, 0.0))
        divisor = code.splat(builder.select(is_zero, ir.Constant(FLOAT, 1.0), scale))
        to = code.at(result, code.times(rows.index, columns))
        with code.loop(code.number(0), columns, LANES) as loop:
            numbers = code.numbers_of(code.at(start, code.times(loop.index, size)), dtype)
            numbers = builder.fdiv(numbers, divisor)
            numbers = builder.select(builder.fcmp_ordered("ord", numbers, numbers), numbers, of(0.0))
            numbers = code.larger(of(-LARGEST), code.negated(code.larger(of(-LARGEST), code.negated(numbers))))
            whole_numbers = builder.fptosi(builder.call(nearest, [numbers]), ir.VectorType(WORD, LANES))
            code.store(builder.trunc(whole_numbers, ir.VectorType(BYTE, LANES)), code.at(to, loop.index))
    code.end()
