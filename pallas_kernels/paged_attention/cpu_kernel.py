"""The kernel for CPUs, as LLVM code, written for one model's heads and pages (`Form`); `cpu_operands` has what it is
called with.

Whoever has a part of a sequence and a group takes its queries one by one, or `Form.queries` at once, and for these
walks the context page by page with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). What a query's
numbers are added up from, and in which order, follows from its own context alone, and so do their bits: a page that
only others of its tile see leaves them as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, FLOAT, HALF_WORD, LONG, POINTER, WORD, Code, Value
from pallas_kernels.cpu_ffi.work_sharing import UNIT
from pallas_kernels.paged_attention.cpu_ffi import LEAST_TILES_QUERIES, Form
from pallas_kernels.paged_attention.cpu_operands import Operands
from pallas_kernels.paged_attention.cpu_tiles import MatrixTile

#: rows, and vectors of 16 numbers, whose sums registers hold at once
ROWS_TILE, VECTORS_TILE = 4, 2
NEVER = -1e30  # a score of what is not seen


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`, by the name of its form."""
    form = Form.named(name)
    made = ir.Module(name=name)
    tiles = {queries: _Tile(made, form, queries).function for queries in sorted({1, form.queries})}
    many = MatrixTile(made, form).function if form.by_tiles else None
    part = _part(made, form, tiles, many)
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    with code.loop(code.divided(begin, UNIT), code.divided(code.add(end, UNIT - 1), UNIT), 1) as items:
        code.builder.call(part, [table, items.index])
    code.end()
    return made


def _part(made: ir.Module, form: Form, tiles: dict[int, Any], many: Any) -> Any:
    """Writes the function (table, item): attention of a part of a sequence's queries, of one group. Zeros are written
    for what comes behind a sequence's last valid query, for all of a sequence that has too many, and, with the last
    sequence, for tokens that are nobody's.
    """
    code = Code(made, "part", [POINTER, LONG])
    given, item = code.arguments
    table, builder = Operands(code, given, form), code.builder
    groups, parts = code.divided(table.dim("query", 1), form.group), table.integer("where", 5)
    head, rest = builder.urem(item, groups), code.divided(item, groups)
    part, seq = builder.urem(rest, parts), code.divided(rest, parts)
    tokens = table.dim("query", 0)
    first, behind = table.integer("query_start", seq), table.integer("query_start", code.add(seq, 1))
    count = code.subtract(behind, first)
    few = builder.icmp_signed("<=", count, table.integer("where", 4))
    first, behind = code.smaller(first, tokens), code.smaller(behind, tokens)
    behind = builder.select(builder.icmp_signed("==", code.add(seq, 1), table.dim("tables", 1)), tokens, behind)
    # behind the last valid token: the token, and its position
    last, valid = builder.select(few, behind, first), table.data("valid")
    with code.loop(first, last, 1, [first, code.number(0)]) as places:
        is_valid = builder.icmp_unsigned("!=", code.load(code.at(valid, places.index), BYTE), ir.Constant(BYTE, 0))
        position = code.add(table.integer("positions", places.index), 1)
        places.next[0] = builder.select(is_valid, code.add(places.index, 1), places.values[0])
        places.next[1] = builder.select(is_valid, position, places.values[1])
    last, seen_to = places.values
    count = code.subtract(last, first)

    def tiles_of(queries: int, compute: Callable[[list[Value]], Any]) -> None:
        """Of neighbouring tiles of so many queries, to each part its own."""
        num_tiles = code.divided(code.add(count, queries - 1), queries)
        each = code.times(code.divided(code.subtract(code.add(num_tiles, parts), 1), parts), queries)
        begin = code.add(first, builder.mul(part, each))
        end = code.smaller(code.add(begin, each), last)
        with code.loop(begin, end, queries) as places:
            compute([given, seq, head, places.index, code.subtract(last, places.index), seen_to])

    def by_rows(arguments: list[Value]) -> None:
        with builder.if_else(builder.icmp_signed("==", arguments[4], code.number(1))) as (one, several):
            with one:
                builder.call(tiles[1], arguments)
            with several:
                builder.call(tiles[form.queries], arguments)

    if many is None:
        tiles_of(form.queries, by_rows)
    else:
        with builder.if_else(code.below(count, code.number(LEAST_TILES_QUERIES))) as (few_queries, many_queries):
            with few_queries:
                tiles_of(form.queries, by_rows)
            with many_queries:
                tiles_of(form.tile_queries, lambda arguments: builder.call(many, arguments))
    numbers = form.group * form.result_dim
    is_first = builder.icmp_signed("==", part, code.number(0))
    with code.loop(last, builder.select(is_first, behind, last), 1) as places:
        at = code.times(code.add(code.times(places.index, groups), head), 4 * numbers)
        result = code.at(table.data("result"), at)
        for i in range(0, numbers, form.result_lanes):
            code.store(_constant(0.0, form.result_lanes), code.at(result, 4 * i))
    code.end()
    return code.function


@dataclasses.dataclass(frozen=True)
class _Page:
    """A page of the context: where its keys and values are, and which of its positions each query sees."""

    keys: Value
    values: Value
    scales: Value | None
    #: (first, behind), of each query; the first query sees from `first` on, and the last one up to `behind`
    seen: list[tuple[Value, Value]]

    @property
    def first(self) -> Value:
        return self.seen[0][0]

    @property
    def behind(self) -> Value:
        return self.seen[-1][1]


class _Tile:
    """Writes the function (table, sequence, group, first token, tokens, behind): attention of up to `queries` tokens
    of a sequence, of the query heads of one group; none sees position `behind`, nor what lies behind it.

    A row is a query's query head, a query's heads one behind the other. Where there are fewer tokens, the last one is
    computed several times, and written once.
    """

    def __init__(self, made: ir.Module, form: Form, queries: int):
        self._form = form
        self._code = code = Code(made, f"tile_{queries}", [POINTER, LONG, LONG, LONG, LONG, LONG])
        self.function = code.function
        given, seq, group, first, count, behind = code.arguments
        table = Operands(code, given, form)
        self._rows = rows = queries * form.group
        dim, block = form.head_dim, form.block_size
        self._scores, self._sums, self._largest, self._totals = (
            code.scratch(numbers) for numbers in (rows * block, rows * form.result_dim, rows, rows)
        )
        groups = code.divided(table.dim("query", 1), form.group)
        group_of, page_offset, window, least = (table.integer("where", i) for i in range(4))
        self._softcap = code.load(table.data("softcap"), FLOAT) if form.has_softcap else None
        tokens = [code.smaller(code.number(i), code.subtract(count, 1)) for i in range(queries)]
        tokens = [code.add(first, token) for token in tokens]
        places = [code.times(code.add(code.times(token, groups), group), 4 * form.group) for token in tokens]
        self._query = [code.at(table.data("query"), code.times(place, dim)) for place in places]
        self._begin(table.data("start"), group, groups)
        seen_to = [code.smaller(code.add(table.integer("positions", token), 1), behind) for token in tokens]
        seen_from = [code.greater(code.subtract(end, window), least) for end in seen_to]
        columns = code.times(code.add(code.times(group_of, table.dim("tables", 1)), seq), table.dim("tables", 2))
        last = code.divided(code.add(seen_to[-1], block - 1), block)
        with code.loop(code.divided(seen_from[0], block), last, 1) as pages:
            page = code.add(table.integer("tables", code.add(columns, pages.index)), page_offset)
            if form.has_latents:
                lines, apart = code.times(page, block), code.number(0)
            else:
                lines = code.times(code.add(code.times(page, code.times(groups, 2)), group), block)
                apart = code.times(groups, block)
            begin = code.times(pages.index, block)
            scales = None
            if form.is_scaled:
                scales = code.at(table.data("scales"), code.times(lines, 4)), code.times(apart, 4)
            size = dim * form.itemsize
            keys = code.at(table.data("cache"), code.times(lines, size))
            seen = [
                (
                    code.greater(code.subtract(start, begin), code.number(0)),
                    code.smaller(code.subtract(end, begin), code.number(block)),
                )
                for start, end in zip(seen_from, seen_to, strict=True)
            ]
            self._piece(_Page(keys=keys, values=code.at(keys, code.times(apart, size)), scales=scales, seen=seen))
        for query, place in enumerate(places):
            with code.builder.if_then(code.below(code.number(query), count)):
                self._end(query, code.at(table.data("result"), code.times(place, form.result_dim)))
        code.end()

    # ---- a page

    def _piece(self, page: _Page) -> None:
        """Take a page into the sums."""
        form = self._form
        some = [range(first, min(first + ROWS_TILE, self._rows)) for first in range(0, self._rows, ROWS_TILE)]
        for rows in some:
            if form.transposed:
                self._score_columns(page, rows)
            else:
                self._score_rows(page, rows)
        kept = [self._weigh(page, row) for row in range(self._rows)]
        lanes, numbers = form.result_lanes, form.result_dim
        width = lanes * VECTORS_TILE if numbers % (lanes * VECTORS_TILE) == 0 else lanes
        for rows in some:
            for column in range(0, numbers, width):
                self._add_values(page, rows, kept, range(column, column + width, lanes))

    def _score_columns(self, page: _Page, rows: range) -> None:
        """Scores of keys that lie as [head_dim, block_size], of several positions at a time."""
        form, code = self._form, self._code
        lanes = form.position_lanes
        vectors = VECTORS_TILE if form.block_size % (lanes * VECTORS_TILE) == 0 else 1
        together = 2 if form.head_dim % 2 == 0 else 1
        with code.loop(code.number(0), code.number(form.block_size), lanes * vectors) as places:
            empty = [_constant(0.0, lanes)] * (len(rows) * vectors)
            with code.loop(code.number(0), code.number(form.head_dim), together, empty) as numbers:
                for j in range(together):
                    d = code.add(numbers.index, j)
                    at = code.add(code.times(d, form.block_size), places.index)
                    line = code.at(page.keys, code.times(at, form.itemsize))
                    keys = [self._stored(code.at(line, form.itemsize * lanes * i), lanes) for i in range(vectors)]
                    for i, row in enumerate(rows):
                        query = code.splat(code.load(self._query_at(row, code.times(d, 4)), FLOAT), lanes)
                        for k, key in enumerate(keys):
                            here = i * vectors + k
                            numbers.next[here] = code.multiply_add(query, key, numbers.next[here])
            for i, row in enumerate(rows):
                for k in range(vectors):
                    place = code.add(places.index, row * form.block_size + lanes * k)
                    code.store(numbers.values[i * vectors + k], code.at(self._scores, code.times(place, 4)))

    def _score_rows(self, page: _Page, rows: range) -> None:
        """Scores of keys that lie as [block_size, head_dim], one position after the other."""
        form, code = self._form, self._code
        with code.loop(page.first, page.behind, 1) as places:
            line = code.at(page.keys, code.times(places.index, form.head_dim * form.itemsize))
            totals = [_constant(0.0, form.lanes) for _ in rows]
            for d in range(0, form.head_dim, form.lanes):
                key = self._stored(code.at(line, d * form.itemsize), form.lanes)
                for i, row in enumerate(rows):
                    query = code.floats(self._query_at(row, code.number(4 * d)), form.lanes)
                    totals[i] = code.multiply_add(query, key, totals[i])
            for total, row in zip(totals, rows, strict=True):
                place = code.add(places.index, row * form.block_size)
                code.store(code.sum_of(total), code.at(self._scores, code.times(place, 4)))

    def _weigh(self, page: _Page, row: int) -> Value:
        """Make a row's scores weights, and add these up; what was added before counts so much from now on."""
        form, code = self._form, self._code
        lanes, builder, seen = form.position_lanes, self._code.builder, page.seen[row // form.group]
        scores = code.at(self._scores, 4 * row * form.block_size)
        largest_at, total_at = (code.at(array, 4 * row) for array in (self._largest, self._totals))
        before = code.load(largest_at, FLOAT)
        with self._vectors([_constant(NEVER, lanes)]) as (places, address):
            score = code.floats(code.at(scores, address), lanes)
            if page.scales is not None:
                score = code.multiplied(score, code.floats(code.at(page.scales[0], address), lanes))
            if self._softcap is not None:
                score = self._capped(score)
            score = builder.select(self._seen(seen, places.index), score, _constant(NEVER, lanes))
            code.store(score, code.at(scores, address))
            places.next[0] = code.larger(places.next[0], score)
        largest = code.larger(before, code.largest_of(places.values[0]))
        with self._vectors([_constant(0.0, lanes)]) as (places, address):
            score = code.floats(code.at(scores, address), lanes)
            weight = code.exp(builder.fsub(score, code.splat(largest, lanes)))
            weight = builder.select(self._seen(seen, places.index), weight, _constant(0.0, lanes))
            places.next[0] = code.summed(places.next[0], weight)
            if page.scales is not None:
                of_values = code.at(page.scales[0], code.add(page.scales[1], address))
                weight = code.multiplied(weight, code.floats(of_values, lanes))
            code.store(weight, code.at(scores, address))
        kept = builder.extract_element(code.exp(code.splat(builder.fsub(before, largest), lanes)), _first())
        total = code.multiply_add(code.load(total_at, FLOAT), kept, code.sum_of(places.values[0]))
        code.store(largest, largest_at)
        code.store(total, total_at)
        return kept

    def _add_values(self, page: _Page, rows: range, kept: list[Value], columns: range) -> None:
        """Add some numbers of the values of the positions that any query sees: a former owner of the page may have left
        NaN at the others.
        """
        form, code = self._form, self._code
        lanes = form.result_lanes
        sums = [code.at(self._sums, 4 * (row * form.result_dim + column)) for row in rows for column in columns]
        scaled = [
            code.multiplied(code.floats(at, lanes), code.splat(kept[row], lanes))
            for at, row in zip(sums, [row for row in rows for _ in columns], strict=True)
        ]
        with code.loop(page.first, page.behind, 1, scaled) as places:
            line = code.at(page.values, code.times(places.index, form.head_dim * form.itemsize))
            values = [self._stored(code.at(line, column * form.itemsize), lanes) for column in columns]
            for i, row in enumerate(rows):
                place = code.add(places.index, row * form.block_size)
                weight = code.splat(code.load(code.at(self._scores, code.times(place, 4)), FLOAT), lanes)
                for k, value in enumerate(values):
                    here = i * len(values) + k
                    places.next[here] = code.multiply_add(weight, value, places.next[here])
        for at, value in zip(sums, places.values, strict=True):
            code.store(value, at)

    # ---- a tile's begin and end

    def _begin(self, start: Value, group: Value, groups: Value) -> None:
        form, code = self._form, self._code
        first = code.times(group, 4 * form.group)
        behind = code.times(groups, 4 * form.group)
        for row in range(self._rows):
            at = code.at(start, code.add(first, 4 * (row % form.group)))
            code.store(code.load(at, FLOAT), code.at(self._largest, 4 * row))
            code.store(code.load(code.at(at, behind), FLOAT), code.at(self._totals, 4 * row))
        for i in range(0, self._rows * form.result_dim, form.result_lanes):
            code.store(_constant(0.0, form.result_lanes), code.at(self._sums, 4 * i))

    def _end(self, query: int, result: Value) -> None:
        """Write a query's rows."""
        form, code = self._form, self._code
        for head in range(form.group):
            row = query * form.group + head
            total = code.larger(code.load(code.at(self._totals, 4 * row), FLOAT), ir.Constant(FLOAT, 1e-30))
            inverse = code.splat(code.builder.fdiv(ir.Constant(FLOAT, 1.0), total), form.result_lanes)
            for d in range(0, form.result_dim, form.result_lanes):
                sums = code.floats(code.at(self._sums, 4 * (row * form.result_dim + d)), form.result_lanes)
                code.store(code.multiplied(sums, inverse), code.at(result, 4 * (head * form.result_dim + d)))

    # ---- parts

    @contextlib.contextmanager
    def _vectors(self, carried: list[Value]) -> Iterator[tuple]:
        """A loop over a page's positions, a vector at a time, and how many bytes the scores of it are behind."""
        code, form = self._code, self._form
        with code.loop(code.number(0), code.number(form.block_size), form.position_lanes, carried) as places:
            yield places, code.times(places.index, 4)

    def _query_at(self, row: int, offset: Value) -> Value:
        """Where a row's query is, so many bytes further."""
        form, code = self._form, self._code
        query, head = divmod(row, form.group)
        return code.at(self._query[query], code.add(offset, 4 * head * form.head_dim))

    def _seen(self, seen: tuple[Value, Value], place: Value) -> Value:
        """Which of a vector's positions are."""
        code, lanes = self._code, self._form.position_lanes
        numbers = ir.Constant(ir.VectorType(WORD, lanes), list(range(lanes)))
        places = code.builder.add(code.splat(code.builder.trunc(place, WORD), lanes), numbers)
        first, behind = (code.splat(code.builder.trunc(edge, WORD), lanes) for edge in seen)
        after = code.builder.icmp_signed(">=", places, first)
        return code.builder.and_(after, code.builder.icmp_signed("<", places, behind))

    def _capped(self, score: Value) -> Value:
        """``cap * tanh(score / cap)``, by ``tanh(x) = 1 - 2 / (exp(2 x) + 1)``."""
        code, builder, lanes = self._code, self._code.builder, self._form.position_lanes
        cap = code.splat(self._softcap, lanes)
        double = code.multiplied(builder.fdiv(score, cap), _constant(2.0, lanes))
        below = code.summed(code.exp(double), _constant(1.0, lanes))
        return code.multiplied(cap, builder.fsub(_constant(1.0, lanes), builder.fdiv(_constant(2.0, lanes), below)))

    def _stored(self, address: Value, count: int) -> Value:
        """Numbers of a page, as float32."""
        code, builder, stored = self._code, self._code.builder, self._form.stored
        if stored == "float32":
            return code.floats(address, count)
        if stored == "float16":
            return builder.fpext(
                builder.bitcast(code.half_words(address, count), _of(ir.HalfType(), count)), _of(FLOAT, count)
            )
        if stored == "bfloat16":
            bits = builder.zext(code.half_words(address, count), _of(WORD, count))
            return builder.bitcast(code.shifted_up(bits, 16), _of(FLOAT, count))
        if stored == "int8":
            return code.signed(code.widened(code.bytes(address, count), WORD))
        bits = builder.zext(code.bytes(address, count), _of(HALF_WORD, count))
        if stored == "float8_e5m2":  # the upper half of a float16
            return builder.fpext(
                builder.bitcast(code.shifted_up(bits, 8), _of(ir.HalfType(), count)), _of(FLOAT, count)
            )
        assert stored == "float8_e4m3fn"  # three bits of fraction, and an exponent whose bias is 8 less than float16's
        sign = code.shifted_up(code.masked(bits, 0x80), 8)
        half = builder.or_(sign, code.shifted_up(code.masked(bits, 0x7F), 7))
        return code.multiplied(self._from_half(half), _constant(256.0, count))

    def _from_half(self, bits: Value) -> Value:
        """float16's bits, as float32."""
        builder, count = self._code.builder, bits.type.count
        return builder.fpext(builder.bitcast(bits, _of(ir.HalfType(), count)), _of(FLOAT, count))


def _of(number: ir.Type, count: int) -> ir.Type:
    return ir.VectorType(number, count)


def _constant(value: float, count: int) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, count), [value] * count)


def _first() -> Value:
    return ir.Constant(WORD, 0)
