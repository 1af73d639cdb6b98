"""The kernels of a product of rows with a dense weight, as LLVM code.

Operands: x [M, K]; layer i32 []; the weight's stack [L, N, K]; the result, float32 [M, N]. Rows of the weight and of x
both lie along K, and are multiplied in vectors, so nothing has to be packed: a tile keeps a vector of sums for each
number of the result, and adds these up in the end. What is added to what follows from K alone, so a row's result has
the same bits whatever other rows there are.

A gated kernel ("gated_silu_bfloat16_16") has a weight [L, 2 N, K], and of both halves' products makes the activation of
the first one times the second.
"""

from __future__ import annotations

import abc
import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value

#: rows of the weight that are multiplied at once
COLUMNS = (4, 1)
#: rows of x that a row of the weight is multiplied by before the next one is: what a core's own cache holds of them
BLOCK = 32
#: rows of x from which on rows of a bfloat16 weight are widened once for all of them
WIDENED_FROM = 5
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
    """A kernel, a function `kernel`, by its name: "dense_bfloat16_16", "gated_silu_bfloat16_16"."""
    made = ir.Module(name=name)
    kind, _, rest = name.partition("_")
    activation, _, form_name = rest.partition("_") if kind == "gated" else ("", "", rest)
    form = FORMS[form_name]
    widens = isinstance(form, Floats) and form.weight_size == 2
    wide = FORMS[f"float32_{form.lanes}"] if widens else form

    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    builder = code.builder
    table, begin, end = code.arguments
    x, layer, weight, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(4))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 3))
    num_rows, in_features = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result_dims, 8), LONG)
    direct = _Products(made, code, form, x, in_features, form.weight_size, "tile")
    widened = _Products(made, code, wide, x, in_features, form.weight_size, "wide") if widens else direct
    row_bytes = code.times(in_features, form.weight_size)
    halves = 2 if activation else 1
    apart = code.times(out_features, row_bytes)  # of a gate and what it is for
    place = code.times(builder.sext(code.load(layer, WORD), LONG), halves)
    weight = code.at(weight, code.times(place, apart))
    room = code.allocated(code.times(in_features, wide.weight_size * COLUMNS[0] * halves)) if widens else None
    sums = code.scratch(halves * BLOCK * COLUMNS[0]) if activation else None

    def multiply(products: _Products, n: int, rows: Rows, column: Value, of_weight: Value, size: int) -> None:
        """A block of rows by n rows of the weight, in `room` or where they lie, which have numbers of `size` bytes."""
        place = code.add(code.times(rows[0], out_features), column)
        to = code.at(result, code.times(place, 4))
        following = code.at(weight, code.times(code.add(column, n), row_bytes))
        if sums is None:
            products.write(n, rows, [(of_weight, to, following)], out_features)
            return
        behind = code.times(in_features, n * size) if of_weight is room else apart
        up = code.at(of_weight, behind), code.at(sums, 4 * BLOCK * COLUMNS[0]), code.at(following, apart)
        products.write(n, rows, [(of_weight, sums, following), up], code.number(COLUMNS[0]))
        _gate(code, activation, sums, n, code.subtract(rows[1], rows[0]), to, out_features)

    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        rows = blocks.index, code.smaller(code.add(blocks.index, BLOCK), num_rows)
        are_many = code.below(code.number(WIDENED_FROM - 1), code.subtract(rows[1], rows[0]))
        first: Value = begin
        for n in COLUMNS:
            last = whole(code, first, end, n)
            with code.loop(first, last, n) as columns:
                here = code.at(weight, code.times(columns.index, row_bytes))
                if room is None:
                    multiply(direct, n, rows, columns.index, here, form.weight_size)
                else:
                    with builder.if_else(are_many) as (many, few):
                        with many:
                            count = code.times(in_features, n)
                            _widen(code, form, here, room, count)
                            if activation:
                                behind = code.at(room, code.times(count, wide.weight_size))
                                _widen(code, form, code.at(here, apart), behind, count)
                            multiply(widened, n, rows, columns.index, room, wide.weight_size)
                        with few:
                            multiply(direct, n, rows, columns.index, here, form.weight_size)
            first = last
    if room is not None:
        code.free(room)
    code.end()
    return made


class _Products:
    """Writes products of rows of x with rows of the weight.

    Args:
        form: of the rows that are multiplied.
        size: bytes of a number of the weight, as it is stored.
    """

    def __init__(self, made: ir.Module, code: Code, form: Form, x: Value, in_features: Value, size: int, name: str):
        self._code, self._form, self._x, self._in_features = code, form, x, in_features
        self._tiles = {(m, n): tile(made, form, m, n, f"{name}_{m}_{n}") for m in form.rows for n in COLUMNS}
        self._row_bytes = code.times(in_features, size)

    def write(self, n: int, rows: Rows, places: list[tuple[Value, Value, Value]], stride: Value) -> None:
        """A block of rows by n rows of the weight, of each of some places.

        Args:
            places: where these rows are, where the results are written, and where the rows are that come next.
            stride: numbers from a row's results to those of the next one.
        """
        code, form, in_features = self._code, self._form, self._in_features
        # of what comes next as many cache lines for each row of x: memory is read while a core computes
        lines = code.times(code.subtract(rows[1], rows[0]), LINE)
        share = code.divided(code.subtract(code.add(code.times(self._row_bytes, n), lines), 1), lines)
        done, stop = rows
        for m in form.rows:
            last = whole(code, done, stop, m)
            with code.loop(done, last, m) as loop:
                row = code.subtract(loop.index, rows[0])
                line = code.times(row, share)
                with code.loop(line, code.add(line, code.times(share, m)), 1) as ahead:
                    for _, _, following in places:
                        code.prefetch(code.at(following, code.times(ahead.index, LINE)), 2)
                of_x = code.at(self._x, code.times(loop.index, code.times(in_features, form.x_size)))
                for of_weight, to, _ in places:
                    own = code.at(to, code.times(code.times(row, stride), 4))
                    code.builder.call(self._tiles[m, n], [of_x, of_weight, own, in_features, stride])
            done = last


def _gate(code: Code, activation: str, sums: Value, n: int, count: Value, result: Value, stride: Value) -> None:
    """Write the activation of gates times the others, of `count` rows of n numbers."""
    lanes = COLUMNS[0]
    with code.loop(code.number(0), count, LANES // lanes) as loop:
        here = code.at(sums, code.times(loop.index, 4 * lanes))
        gate, up = code.floats(here), code.floats(code.at(here, 4 * BLOCK * lanes))
        found = code.multiplied(ACTIVATIONS[activation](code, gate), up)
        for i in range(LANES // lanes):
            row = code.add(loop.index, i)
            with code.builder.if_then(code.below(row, count)):
                code.store(code.part(found, i * lanes, n), code.at(result, code.times(code.times(row, stride), 4)))


def _silu(code: Code, x: Value) -> Value:
    """``x / (1 + exp(-x))`` (Elfwing et al. 2017, arXiv:1702.03118)."""
    return _by_sigmoid(code, x, code.negated(x))


def _gelu(code: Code, x: Value) -> Value:
    """``x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z))``, ``z = sqrt(2 / pi) (x + 0.044715 x^3)`` (Hendrycks and Gimpel
    2016, arXiv:1606.08415).
    """
    of = lambda value: ir.Constant(x.type, [value] * LANES)  # noqa: E731
    factor = math.sqrt(8 / math.pi)
    slope = code.multiply_add(code.multiplied(x, x), of(-0.044715 * factor), of(-factor))
    return _by_sigmoid(code, x, code.multiplied(x, slope))


def _by_sigmoid(code: Code, x: Value, power: Value) -> Value:
    """``x / (1 + exp(power))``."""
    return code.builder.fdiv(x, code.summed(ir.Constant(x.type, [1.0] * LANES), code.exp(power)))


#: by the names that kernels have
ACTIVATIONS = {"silu": _silu, "gelu": _gelu}


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
