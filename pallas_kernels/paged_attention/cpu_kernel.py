"""The kernel of single tokens on CPUs, as LLVM code, written for one model's heads and pages (`Form`).

Operands: queries, float32 [R, heads, head_dim], scaled; the cache; block tables i32 [groups, S, W]; where the layer is,
i32 [5] (group, first page, window, first position that anybody sees, single tokens); positions i32 [T]; of each query
head the maximum and the sum that the softmax begins with, float32 [2, heads]; the soft cap, float32 []; the scales of
the pages, where they have some. Results: i32 [UNIT * R * kv_heads], which nobody writes or reads (the work is shared
out along it, a `UNIT` for each sequence and KV head), and float32 [R, heads, head_dim].

Whoever has a sequence's KV head walks its context page by page with a running softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867). What a row's numbers are added up from follows from its own context alone, and so do their bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, HALF_WORD, LONG, POINTER, WORD, Code, Value
from pallas_kernels.cpu_ffi.work_sharing import UNIT
from pallas_kernels.paged_attention.cpu_ffi import Form

#: query heads, and vectors of 16 numbers, whose sums registers hold at once
HEADS_TILE, VECTORS_TILE = 4, 2
NEVER = -1e30  # a score of what is not seen


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`, by the name of its form."""
    form = Form.named(name)
    made = ir.Module(name=name)
    row = _Row(made, form).function
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    with code.loop(code.divided(begin, UNIT), code.divided(code.add(end, UNIT - 1), UNIT), 1) as items:
        code.builder.call(row, [table, items.index])
    code.end()
    return made


@dataclasses.dataclass(frozen=True)
class _Page:
    """A page of the context: where its keys and values are, its first position, and which of its positions are seen."""

    keys: Value
    values: Value
    scales: Value | None
    start: Value
    first: Value
    behind: Value


class _Row:
    """Writes the function (table, item): attention of one sequence's query heads of one KV head."""

    def __init__(self, made: ir.Module, form: Form):
        self._form = form
        self._code = code = Code(made, "row", [POINTER, LONG])
        self.function = code.function
        table, item = code.arguments
        group, dim, block = form.group, form.head_dim, form.block_size
        self._scores, self._sums, self._largest, self._totals = (
            code.scratch(count) for count in (group * block, group * dim, group, group)
        )
        query, cache, tables, where, positions, start, softcap = (self._data(table, i) for i in range(7))
        dims = self._dims(table, 1)
        kv_heads = code.divided(code.load(code.at(dims, 8), LONG), 2)
        result = self._data(table, 8 + form.is_scaled)
        group_of, page_offset, window, least, decodes = (self._integer(where, i) for i in range(5))
        seq, head = code.divided(item, kv_heads), code.builder.urem(item, kv_heads)
        self._query = code.at(query, code.times(item, 4 * group * dim))
        result = code.at(result, code.times(item, 4 * group * dim))
        self._softcap = code.load(softcap, FLOAT) if form.has_softcap else None
        builder = code.builder
        with builder.if_else(code.below(seq, decodes)) as (computed, padding):
            with computed:
                self._begin(start, head, kv_heads)
                position = self._integer(positions, seq)
                seen_to = code.add(position, 1)
                seen_from = self._larger(code.subtract(seen_to, window), least)
                shape = self._dims(table, 2)
                num_seqs, width = (code.load(code.at(shape, 8 * i), LONG) for i in (1, 2))
                columns = code.times(code.add(code.times(group_of, num_seqs), seq), width)
                last = code.divided(code.add(seen_to, block - 1), block)
                with code.loop(code.divided(seen_from, block), last, 1) as pages:
                    page = code.add(self._integer(tables, code.add(columns, pages.index)), page_offset)
                    rows = code.times(code.add(code.times(page, code.times(kv_heads, 2)), head), block)
                    apart = code.times(kv_heads, block)
                    begin = code.times(pages.index, block)
                    scales = None
                    if form.is_scaled:
                        scales = code.at(self._data(table, 7), code.times(rows, 4)), code.times(apart, 4)
                    size = dim * form.itemsize
                    keys = code.at(cache, code.times(rows, size))
                    self._piece(
                        _Page(
                            keys=keys,
                            values=code.at(keys, code.times(apart, size)),
                            scales=scales,
                            start=begin,
                            first=self._larger(code.subtract(seen_from, begin), code.number(0)),
                            behind=self._smaller(code.subtract(seen_to, begin), code.number(block)),
                        )
                    )
                self._end(result)
            with padding:
                for i in range(0, group * dim, form.lanes):
                    code.store(_constant(0.0, form.lanes), code.at(result, 4 * i))
        code.end()

    # ---- a page

    def _piece(self, page: _Page) -> None:
        """Take a page into the sums."""
        form = self._form
        for first in range(0, form.group, HEADS_TILE):
            heads = range(first, min(first + HEADS_TILE, form.group))
            if form.transposed:
                self._score_columns(page, heads)
            else:
                self._score_rows(page, heads)
        kept = [self._weigh(page, head) for head in range(form.group)]
        width = form.lanes * VECTORS_TILE if form.head_dim % (form.lanes * VECTORS_TILE) == 0 else form.lanes
        for first in range(0, form.group, HEADS_TILE):
            heads = range(first, min(first + HEADS_TILE, form.group))
            for column in range(0, form.head_dim, width):
                self._add_values(page, heads, kept, range(column, column + width, form.lanes))

    def _score_columns(self, page: _Page, heads: range) -> None:
        """Scores of keys that lie as [head_dim, block_size], of several positions at a time."""
        form, code = self._form, self._code
        lanes = form.position_lanes
        vectors = VECTORS_TILE if form.block_size % (lanes * VECTORS_TILE) == 0 else 1
        together = 2 if form.head_dim % 2 == 0 else 1
        with code.loop(code.number(0), code.number(form.block_size), lanes * vectors) as places:
            empty = [_constant(0.0, lanes)] * (len(heads) * vectors)
            with code.loop(code.number(0), code.number(form.head_dim), together, empty) as numbers:
                for j in range(together):
                    d = code.add(numbers.index, j)
                    at = code.add(code.times(d, form.block_size), places.index)
                    row = code.at(page.keys, code.times(at, form.itemsize))
                    keys = [self._stored(code.at(row, form.itemsize * lanes * i), lanes) for i in range(vectors)]
                    for i, head in enumerate(heads):
                        place = code.add(code.times(d, 4), 4 * head * form.head_dim)
                        query = code.splat(code.load(code.at(self._query, place), FLOAT), lanes)
                        for k, key in enumerate(keys):
                            here = i * vectors + k
                            numbers.next[here] = code.multiply_add(query, key, numbers.next[here])
            for i, head in enumerate(heads):
                for k in range(vectors):
                    place = code.add(places.index, head * form.block_size + lanes * k)
                    code.store(numbers.values[i * vectors + k], code.at(self._scores, code.times(place, 4)))

    def _score_rows(self, page: _Page, heads: range) -> None:
        """Scores of keys that lie as [block_size, head_dim], one position after the other."""
        form, code = self._form, self._code
        with code.loop(page.first, page.behind, 1) as places:
            row = code.at(page.keys, code.times(places.index, form.head_dim * form.itemsize))
            totals = [_constant(0.0, form.lanes) for _ in heads]
            for d in range(0, form.head_dim, form.lanes):
                key = self._stored(code.at(row, d * form.itemsize), form.lanes)
                for i, head in enumerate(heads):
                    query = code.floats(code.at(self._query, 4 * (head * form.head_dim + d)), form.lanes)
                    totals[i] = code.multiply_add(query, key, totals[i])
            for total, head in zip(totals, heads, strict=True):
                place = code.add(places.index, head * form.block_size)
                code.store(code.sum_of(total), code.at(self._scores, code.times(place, 4)))

    def _weigh(self, page: _Page, head: int) -> Value:
        """Make a head's scores weights, and add these up; what was added before counts so much from now on."""
        form, code = self._form, self._code
        lanes, builder = form.position_lanes, self._code.builder
        scores = code.at(self._scores, 4 * head * form.block_size)
        largest_at, total_at = (code.at(array, 4 * head) for array in (self._largest, self._totals))
        before = code.load(largest_at, FLOAT)
        with self._vectors([_constant(NEVER, lanes)]) as (places, address):
            score = code.floats(code.at(scores, address), lanes)
            if page.scales is not None:
                score = code.multiplied(score, code.floats(code.at(page.scales[0], address), lanes))
            if self._softcap is not None:
                score = self._capped(score)
            score = builder.select(self._seen(page, places.index), score, _constant(NEVER, lanes))
            code.store(score, code.at(scores, address))
            places.next[0] = code.larger(places.next[0], score)
        largest = code.larger(before, code.largest_of(places.values[0]))
        with self._vectors([_constant(0.0, lanes)]) as (places, address):
            score = code.floats(code.at(scores, address), lanes)
            weight = code.exp(builder.fsub(score, code.splat(largest, lanes)))
            weight = builder.select(self._seen(page, places.index), weight, _constant(0.0, lanes))
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

    def _add_values(self, page: _Page, heads: range, kept: list[Value], columns: range) -> None:
        """Add some numbers of the values of the positions that are seen: a former owner of the page may have left NaN
        at the others.
        """
        form, code = self._form, self._code
        sums = [code.at(self._sums, 4 * (head * form.head_dim + column)) for head in heads for column in columns]
        scaled = [
            code.multiplied(code.floats(at, form.lanes), code.splat(kept[head], form.lanes))
            for at, head in zip(sums, [head for head in heads for _ in columns], strict=True)
        ]
        with code.loop(page.first, page.behind, 1, scaled) as places:
            row = code.at(page.values, code.times(places.index, form.head_dim * form.itemsize))
            values = [self._stored(code.at(row, column * form.itemsize), form.lanes) for column in columns]
            for i, head in enumerate(heads):
                place = code.add(places.index, head * form.block_size)
                weight = code.splat(code.load(code.at(self._scores, code.times(place, 4)), FLOAT), form.lanes)
                for k, value in enumerate(values):
                    here = i * len(values) + k
                    places.next[here] = code.multiply_add(weight, value, places.next[here])
        for at, value in zip(sums, places.values, strict=True):
            code.store(value, at)

    # ---- a row's begin and end

    def _begin(self, start: Value, head: Value, kv_heads: Value) -> None:
        form, code = self._form, self._code
        first = code.times(head, 4 * form.group)
        behind = code.times(kv_heads, 4 * form.group)
        for i in range(form.group):
            at = code.at(start, code.add(first, 4 * i))
            code.store(code.load(at, FLOAT), code.at(self._largest, 4 * i))
            code.store(code.load(code.at(at, behind), FLOAT), code.at(self._totals, 4 * i))
        for i in range(0, form.group * form.head_dim, form.lanes):
            code.store(_constant(0.0, form.lanes), code.at(self._sums, 4 * i))

    def _end(self, result: Value) -> None:
        form, code = self._form, self._code
        for head in range(form.group):
            total = code.larger(code.load(code.at(self._totals, 4 * head), FLOAT), ir.Constant(FLOAT, 1e-30))
            inverse = code.splat(code.builder.fdiv(ir.Constant(FLOAT, 1.0), total), form.lanes)
            for d in range(0, form.head_dim, form.lanes):
                at = 4 * (head * form.head_dim + d)
                code.store(
                    code.multiplied(code.floats(code.at(self._sums, at), form.lanes), inverse), code.at(result, at)
                )

    # ---- parts

    @contextlib.contextmanager
    def _vectors(self, carried: list[Value]) -> Iterator[tuple]:
        """A loop over a page's positions, a vector at a time, and how many bytes the scores of it are behind."""
        code, form = self._code, self._form
        with code.loop(code.number(0), code.number(form.block_size), form.position_lanes, carried) as places:
            yield places, code.times(places.index, 4)

    def _seen(self, page: _Page, place: Value) -> Value:
        """Which of a vector's positions are seen."""
        code, lanes = self._code, self._form.position_lanes
        numbers = ir.Constant(ir.VectorType(WORD, lanes), list(range(lanes)))
        places = code.builder.add(code.splat(code.builder.trunc(place, WORD), lanes), numbers)
        first, behind = (code.splat(code.builder.trunc(edge, WORD), lanes) for edge in (page.first, page.behind))
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

    def _data(self, table: Value, i: int) -> Value:
        return self._code.load(self._code.at(table, 16 * i), POINTER)

    def _dims(self, table: Value, i: int) -> Value:
        return self._code.load(self._code.at(table, 16 * i + 8), POINTER)

    def _integer(self, array: Value, i: Value | int) -> Value:
        """An i32 number of an array, as i64."""
        code = self._code
        place = code.number(i) if isinstance(i, int) else i
        return code.builder.sext(code.load(code.at(array, code.times(place, 4)), WORD), LONG)

    def _larger(self, a: Value, b: Value) -> Value:
        return self._code.builder.select(self._code.below(a, b), b, a)

    def _smaller(self, a: Value, b: Value) -> Value:
        return self._code.builder.select(self._code.below(a, b), a, b)


def _of(number: ir.Type, count: int) -> ir.Type:
    return ir.VectorType(number, count)


def _constant(value: float, count: int) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, count), [value] * count)


def _first() -> Value:
    return ir.Constant(WORD, 0)
