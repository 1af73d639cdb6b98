"""The kernel of what adapters add to a product on a CPU, as LLVM code, written out for a rank and a dtype.

Operands: x float32 [T, K]; slots i32 [T]; layer i32 []; where parts end i32 [P]; a [L, S, P * r, K] and b [L, S, r, N],
of all layers, read where they lie; the results, i32 [UNIT * T], by which rows are shared out, and float32 [T, N].

An item of work is some neighbours of the rows in the order of their slots. Of each slot that has any among them, up to
four rows at a time are multiplied: by two ranks of a at once, whose products stay in a few hundred bytes, and then by
b, 16 out-features at once. What is added to what depends on neither the other rows nor the slot, so a row's result has
the same bits beside any others.
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.cpu_ffi.work_sharing import UNIT
from pallas_kernels.lora_matmul.cpu_ffi import MOST_PARTS, Form

#: rows that are multiplied at once, most first
TILES = (4, 2, 1)
#: ranks that are multiplied at once: fewer would leave processors with two units for it idle
RANKS = 2
#: rows of a slot that are gathered before they are multiplied
GATHERED = 64
X, SLOTS, LAYER, ENDS, A, B, _, OUT = range(8)


def module(name: str) -> ir.Module:
    """The kernel of a form, by its name: a function `kernel`."""
    form, made = Form.named(name), ir.Module(name=name)
    rows = _Rows(made, form).function
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    begin, end = (code.divided(code.add(bound, UNIT - 1), UNIT) for bound in (begin, end))
    own, cells = code.scratch(2 * GATHERED), code.scratch(4)
    count_at, place_at = cells, code.at(cells, 8)
    num_rows, slots = _dim(code, table, X, 0), _data(code, table, SLOTS)
    code.builder.store(code.number(0), place_at)
    # the first are those without an adapter, -1
    with code.loop(code.number(-1), _dim(code, table, A, 1), 1) as each:
        code.builder.store(code.number(0), count_at)
        with code.loop(code.number(0), num_rows, 1) as row:
            slot = code.builder.sext(code.load(code.at(slots, code.times(row.index, 4)), WORD), LONG)
            place, count = code.load(place_at, LONG), code.load(count_at, LONG)
            is_own = code.builder.icmp_signed("==", slot, each.index)
            is_ours = code.builder.and_(is_own, code.below(place, end))
            is_ours = code.builder.and_(is_ours, code.builder.icmp_signed(">=", place, begin))
            code.builder.store(row.index, code.at(own, code.times(count, 8)))
            count = code.add(count, code.builder.zext(is_ours, LONG))
            code.builder.store(code.add(place, code.builder.zext(is_own, LONG)), place_at)
            full = code.divided(count, GATHERED)
            with code.loop(code.number(0), full, 1):
                code.builder.call(rows, [table, each.index, own, count])
            code.builder.store(code.subtract(count, code.times(full, GATHERED)), count_at)
        code.builder.call(rows, [table, each.index, own, code.load(count_at, LONG)])
    code.end()
    return made


class _Rows:
    """A function (table, slot, addresses of the numbers of some of its rows, how many) that makes these rows."""

    def __init__(self, made: ir.Module, form: Form):
        self._form = form
        tiles = [(size, self._tile(made, size)) for size in TILES]
        empty = self._empty(made)
        code = Code(made, "rows", [POINTER, LONG, POINTER, LONG])
        table, slot, own, count = code.arguments
        has_none = code.builder.zext(code.below(slot, code.number(0)), LONG)
        with code.loop(code.number(0), code.times(count, has_none), 1) as each:
            code.builder.call(empty, [table, code.at(own, code.times(each.index, 8))])
        done: Value = code.times(count, has_none)
        for size, tile in tiles:
            behind = code.add(done, code.times(code.divided(code.subtract(count, done), size), size))
            with code.loop(done, behind, size) as each:
                code.builder.call(tile, [table, slot, code.at(own, code.times(each.index, 8))])
            done = behind
        code.end()
        self.function = code.function

    def _empty(self, made: ir.Module) -> ir.Function:
        """A function (table, address of a row's number) that makes a row of zeros."""
        code = Code(made, "empty", [POINTER, POINTER])
        table, own = code.arguments
        (out,) = _row_starts(code, table, OUT, own, 1)
        with code.loop(code.number(0), _dim(code, table, OUT, 1), LANES) as column:
            code.store(_zeros(), code.at(out, code.times(column.index, 4)))
        code.end()
        return code.function

    def _tile(self, made: ir.Module, size: int) -> ir.Function:
        """A function (table, slot, addresses of the numbers of its rows) that makes `size` rows."""
        code, form = Code(made, f"tile_{size}", [POINTER, LONG, POINTER]), self._form
        table, slot, own = code.arguments
        low = [code.scratch(MOST_PARTS * form.rank) for _ in range(size)]
        layer = code.builder.sext(code.load(_data(code, table, LAYER), WORD), LONG)
        stack = code.add(code.times(layer, _dim(code, table, A, 1)), slot)
        self._multiply_a(code, stack, _row_starts(code, table, X, own, size), low)
        outs, b = _row_starts(code, table, OUT, own, size), _data(code, table, B)
        columns = _dim(code, table, B, 3)
        b = code.at(b, code.times(code.times(code.times(stack, form.rank), columns), form.itemsize))
        ends, first = _data(code, table, ENDS), code.number(0)
        with code.loop(code.number(0), _dim(code, table, ENDS, 0), 1, [first]) as part:
            end = code.builder.sext(code.load(code.at(ends, code.times(part.index, 4)), WORD), LONG)
            offset = code.times(part.index, 4 * form.rank)
            with code.loop(part.values[0], end, LANES) as column:
                place = code.at(b, code.times(column.index, form.itemsize))
                sums = self._multiply_b(code, place, columns, [code.at(each, offset) for each in low])
                for total, out in zip(sums, outs, strict=True):
                    code.store(total, code.at(out, code.times(column.index, 4)))
            part.next[0] = end
        code.end()
        return code.function

    def _multiply_a(self, code: Code, stack: Value, x: list[Value], low: list[Value]) -> None:
        """a's products with some rows of x."""
        table, form = code.arguments[0], self._form
        ranks, columns = _dim(code, table, A, 2), _dim(code, table, A, 3)
        row_bytes = code.times(columns, form.itemsize)
        a = code.at(_data(code, table, A), code.times(code.times(stack, ranks), row_bytes))
        last = code.subtract(ranks, 1)
        with code.loop(code.number(0), ranks, RANKS) as rank:
            # of an odd number of ranks the last one is made twice
            numbers = [rank.index] + [_lesser(code, code.add(rank.index, i), last) for i in range(1, RANKS)]
            starts = [code.at(a, code.times(number, row_bytes)) for number in numbers]
            pairs = [(start, row) for start in range(RANKS) for row in range(len(x))]
            with code.loop(code.number(0), columns, LANES, [_zeros()] * len(pairs)) as column:
                matrix = [_numbers(code, code.at(s, code.times(column.index, form.itemsize)), form) for s in starts]
                rows = [code.floats(code.at(row, code.times(column.index, 4))) for row in x]
                for i, (start, row) in enumerate(pairs):
                    column.next[i] = code.multiply_add(rows[row], matrix[start], column.next[i])
            for (start, row), total in zip(pairs, column.values, strict=True):
                code.store(code.sum_of(total), code.at(low[row], code.times(numbers[start], 4)))

    def _multiply_b(self, code: Code, b: Value, columns: Value, low: list[Value]) -> list[Value]:
        """The products of some rows' numbers with 16 columns of b."""
        form, row_bytes = self._form, code.times(columns, self._form.itemsize)
        together = next(count for count in (16, 8, 4, 2, 1) if form.rank % count == 0)
        with code.loop(code.number(0), code.number(form.rank), together, [_zeros()] * len(low)) as rank:
            start = code.at(b, code.times(rank.index, row_bytes))
            for i in range(together):
                matrix = _numbers(code, start, form)
                for row, numbers in enumerate(low):
                    number = code.load(code.at(numbers, code.times(code.add(rank.index, i), 4)), FLOAT, align=4)
                    rank.next[row] = code.multiply_add(code.splat(number), matrix, rank.next[row])
                start = code.at(start, row_bytes)
        return rank.values


def _numbers(code: Code, address: Value, form: Form) -> Value:
    """16 of an adapter's numbers, as float32."""
    if form.dtype == "float32":
        return code.floats(address)
    bits = code.half_words(address)
    if form.dtype == "float16":
        return code.builder.fpext(code.builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)
    wide = code.builder.zext(bits, ir.VectorType(WORD, LANES))
    return code.builder.bitcast(code.shifted_up(wide, 16), _VECTOR)


def _row_starts(code: Code, table: Value, operand: int, own: Value, count: int) -> list[Value]:
    """Where some rows of a float32 operand begin, of whose numbers the first one's address is given."""
    row_bytes = code.times(_dim(code, table, operand, 1), 4)
    numbers = [code.load(code.at(own, 8 * i), LONG) for i in range(count)]
    return [code.at(_data(code, table, operand), code.times(number, row_bytes)) for number in numbers]


def _data(code: Code, table: Value, operand: int) -> Value:
    return code.load(code.at(table, 16 * operand), POINTER)


def _dim(code: Code, table: Value, operand: int, dim: int) -> Value:
    return code.load(code.at(code.load(code.at(table, 16 * operand + 8), POINTER), 8 * dim), LONG)


def _lesser(code: Code, a: Value, b: Value) -> Value:
    return code.builder.select(code.below(a, b), a, b)


_VECTOR = ir.VectorType(FLOAT, LANES)


def _zeros() -> Value:
    return ir.Constant(_VECTOR, [0.0] * LANES)
