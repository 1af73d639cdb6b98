"""Attention of many queries of a sequence by Intel's AMX (`cpu_ffi.matrix_tiles`), as LLVM code: a part of the kernel
for CPUs (`cpu_kernel`) where pages hold bfloat16 numbers and keys as [head_dim, block_size].

Scores of a page are rows of queries times pairs of its keys' rows, and what is added to the sums are its weights,
rounded to bfloat16, times pairs of its values' rows. Pairs are written as tiles once for all rows. Scores are weights'
logarithms to base 2. What a row's numbers are added up from, and in which order, follows from its own context alone;
single tokens are added up in another way.
"""

from __future__ import annotations

import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import DEPTH, ROW_BYTES, SIDE, TILE_BYTES, Tiles
from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.paged_attention.cpu_ffi import TILES_BLOCK, Form
from pallas_kernels.paged_attention.cpu_operands import Operands

NEVER = -1e30  # a score of what is not seen
_LOG2E = math.log2(math.e)
#: column tiles of a page's scores
_COLUMNS = TILES_BLOCK // SIDE
#: tiles of sums, and the two that are multiplied, of which the second ones alternate
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), 4, (5, 6, 7)


class MatrixTile:
    """Writes the function (table, sequence, group, first token, tokens, behind): attention of up to
    `Form.tile_queries` tokens of a sequence, of the query heads of one group; none sees position `behind`, nor what
    lies behind it.

    A row is a query's query head, a query's heads one behind the other. Sixteen rows take a page from their scores to
    their sums before the next ones do, so that what lies between stays in a core's first cache.
    """

    def __init__(self, made: ir.Module, form: Form):
        self._form = form
        self._code = code = Code(made, "matrix_tile", [POINTER, LONG, LONG, LONG, LONG, LONG])
        self.function = code.function
        given, seq, group, first, left, behind = code.arguments
        self._table = table = Operands(code, given, form)
        dim, rows = form.head_dim, form.tile_queries * form.group
        self._query, self._sums, self._totals = (code.scratch(rows * size) for size in (dim // 2, dim, LANES))
        self._largest, self._seen_from, self._seen_to = (code.scratch(rows * size) for size in (1, 2, 2))
        self._keys, self._values = code.scratch(TILES_BLOCK * dim // 2), code.scratch(TILES_BLOCK * dim // 2)
        self._scores, self._weights = code.scratch(SIDE * TILES_BLOCK), code.scratch(SIDE * TILES_BLOCK // 2)
        self._tiles = Tiles(code)
        scale = code.load(table.data("scale"), FLOAT)
        self._scale = code.splat(code.multiplied(scale, ir.Constant(FLOAT, _LOG2E)))
        self._queries = code.smaller(left, code.number(form.tile_queries))
        self._rows = code.times(self._queries, form.group)

        groups = code.divided(table.dim("query", 1), form.group)
        group_of, page_offset, window, least = (table.integer("where", i) for i in range(4))
        self._tiles.configure(code.number(SIDE))
        self._begin(first, group, groups, window, least, behind)
        columns = code.times(code.add(code.times(group_of, table.dim("tables", 1)), seq), table.dim("tables", 2))
        begin, end = self._edges(code.number(0), code.subtract(self._rows, 1))
        pages_end = code.divided(code.add(end, TILES_BLOCK - 1), TILES_BLOCK)
        page_bytes = code.number(TILES_BLOCK * dim * 2)
        with code.loop(code.divided(begin, TILES_BLOCK), pages_end, 1) as pages:
            page = code.add(table.integer("tables", code.add(columns, pages.index)), page_offset)
            place = code.add(code.times(page, code.times(groups, 2)), group)
            keys = code.at(table.data("cache"), code.times(place, page_bytes))
            values = code.at(keys, code.times(groups, page_bytes))
            at = code.times(pages.index, TILES_BLOCK)
            self._pair_keys(keys)
            self._pair_values(values, self._inside(begin, at), self._inside(end, at))
            with code.loop(code.number(0), self._rows, SIDE) as rows:
                self._add_page(rows.index, at)
        self._tiles.release()
        self._end(first, group, groups)
        code.end()

    # ---- a tile's begin and end

    def _begin(self, first: Value, group: Value, groups: Value, window: Value, least: Value, behind: Value) -> None:
        """Put the queries together, and write what each row sees, and where its softmax begins."""
        form, code, table = self._form, self._code, self._table
        numbers = form.group * form.head_dim
        starts = code.at(table.data("start"), code.times(group, 4 * form.group))
        totals = code.at(starts, code.times(groups, 4 * form.group))
        with code.loop(code.number(0), self._queries, 1) as queries:
            token = code.add(first, queries.index)
            end = code.smaller(code.add(table.integer("positions", token), 1), behind)
            begin = code.greater(code.subtract(end, window), least)
            place = code.add(code.times(token, groups), group)
            source = code.at(table.data("whole"), code.times(place, 2 * numbers))
            to = code.at(self._query, code.times(queries.index, 2 * numbers))
            with code.loop(code.number(0), code.number(2 * numbers), ROW_BYTES) as vectors:
                code.store(code.bytes(code.at(source, vectors.index), ROW_BYTES), code.at(to, vectors.index))
            with code.loop(code.number(0), code.number(form.group), 1) as heads:
                row = code.add(code.times(queries.index, form.group), heads.index)
                at = code.times(heads.index, 4)
                for edge, edges in ((begin, self._seen_from), (end, self._seen_to)):
                    code.builder.store(edge, code.at(edges, code.times(row, 8)), align=8)
                largest = code.multiplied(code.load(code.at(starts, at), FLOAT), ir.Constant(FLOAT, _LOG2E))
                code.store(largest, code.at(self._largest, code.times(row, 4)))
                total = code.builder.insert_element(
                    _all(0.0), code.load(code.at(totals, at), FLOAT), ir.Constant(WORD, 0)
                )
                code.store(total, self._line(self._totals, row, LANES))
        with code.loop(code.number(0), code.times(self._rows, form.head_dim), LANES) as vectors:
            code.store(_all(0.0), code.at(self._sums, code.times(vectors.index, 4)))

    def _end(self, first: Value, group: Value, groups: Value) -> None:
        """Write the results."""
        form, code = self._form, self._code
        width = form.group * form.head_dim
        with code.loop(code.number(0), self._queries, 1) as queries:
            place = code.add(code.times(code.add(first, queries.index), groups), group)
            result = self._line(self._table.data("result"), place, width)
            with code.loop(code.number(0), code.number(form.group), 1) as heads:
                row = code.add(code.times(queries.index, form.group), heads.index)
                total = code.sum_of(code.floats(self._line(self._totals, row, LANES)))
                total = code.larger(total, ir.Constant(FLOAT, 1e-30))
                inverse = code.splat(code.builder.fdiv(ir.Constant(FLOAT, 1.0), total))
                sums = self._line(self._sums, row, form.head_dim)
                to = self._line(result, heads.index, form.head_dim)
                for d in range(0, 4 * form.head_dim, ROW_BYTES):
                    code.store(code.multiplied(code.floats(code.at(sums, d)), inverse), code.at(to, d))

    # ---- a page

    def _pair_keys(self, keys: Value) -> None:
        """Write pairs of neighbouring rows of keys, each of all positions, as tiles of 16 positions."""
        code = self._code
        row_bytes = 2 * TILES_BLOCK
        with code.loop(code.number(0), code.number(self._form.head_dim // 2), 1) as pairs:
            source = code.at(keys, code.times(pairs.index, 2 * row_bytes))
            to = code.at(self._keys, self._pair_place(pairs.index, _COLUMNS))
            for column in range(0, _COLUMNS, 2):
                both = [code.half_words(code.at(source, at + column * SIDE * 2), DEPTH) for at in (0, row_bytes)]
                self._store_pairs(both, code.at(to, column * TILE_BYTES))

    def _pair_values(self, values: Value, first: Value, behind: Value) -> None:
        """Likewise of the values' rows, of neighbouring positions. Zeros are those of positions that no query sees: a
        former owner of the page may have left NaN there.
        """
        code, dim = self._code, self._form.head_dim
        with code.loop(code.number(0), code.number(TILES_BLOCK // 2), 1) as pairs:
            source = code.at(values, code.times(pairs.index, 4 * dim))
            to = code.at(self._values, self._pair_place(pairs.index, dim // SIDE))
            positions = [code.add(code.times(pairs.index, 2), i) for i in (0, 1)]
            seen = [
                code.builder.and_(code.builder.icmp_signed(">=", position, first), code.below(position, behind))
                for position in positions
            ]
            for column in range(0, dim // SIDE, 2):
                both = [code.half_words(code.at(source, at + column * SIDE * 2), DEPTH) for at in (0, 2 * dim)]
                both = [
                    code.builder.select(is_seen, row, code.all(0, row)) for is_seen, row in zip(seen, both, strict=True)
                ]
                self._store_pairs(both, code.at(to, column * TILE_BYTES))

    def _pair_place(self, pair: Value, columns: int) -> Value:
        """Where a pair of rows is, in bytes behind the first tile, of which `columns` lie beside each other."""
        code = self._code
        tile = code.times(code.divided(pair, SIDE), columns * TILE_BYTES)
        return code.add(tile, code.times(code.builder.urem(pair, code.number(SIDE)), ROW_BYTES))

    def _store_pairs(self, rows: list[Value], to: Value) -> None:
        """Two rows of 32 numbers, number by number beside each other, to the same row of two tiles."""
        for half in (0, 1):
            places = [place for i in range(SIDE) for place in (SIDE * half + i, DEPTH + SIDE * half + i)]
            self._code.store(self._code.chosen(rows[0], rows[1], places), self._code.at(to, half * TILE_BYTES))

    def _add_page(self, first: Value, at: Value) -> None:
        """Of sixteen rows, or the last ones."""
        code, dim = self._code, self._form.head_dim
        rows = code.subtract(self._rows, first)
        rows = code.smaller(rows, code.number(SIDE))
        last = code.subtract(code.add(first, rows), 1)
        begin, end = self._edges(first, last)
        behind = code.add(at, TILES_BLOCK)
        seen = code.builder.and_(code.below(begin, behind), code.below(at, end))
        with code.builder.if_then(seen):
            self._multiply(self._line(self._query, first, dim // 2), dim, self._keys, self._scores, TILES_BLOCK, False)
            # positions that the last row and the first one see are seen by all
            begin, end = self._edges(last, first)
            is_whole = code.builder.and_(
                code.builder.icmp_signed("<=", begin, at), code.builder.not_(code.below(end, behind))
            )
            with code.builder.if_else(is_whole) as (all_positions, some_positions):
                for branch, part in ((all_positions, None), (some_positions, at)):
                    with branch, code.loop(code.number(0), rows, 1) as each:
                        self._weigh(each.index, code.add(first, each.index), part)
            self._multiply(self._weights, TILES_BLOCK, self._values, self._line(self._sums, first, dim), dim, True)

    def _weigh(self, place: Value, row: Value, at: Value | None) -> None:
        """Make a row's scores weights, and add these up. Where a score is larger than all before it, what was added
        before counts less from now on.

        Args:
            place: among the sixteen rows.
            at: the page's first position, of which the row may not see all; None: it sees all.
        """
        form, code, builder = self._form, self._code, self._code.builder
        scores = [
            code.floats(code.at(self._line(self._scores, place, TILES_BLOCK), ROW_BYTES * i)) for i in range(_COLUMNS)
        ]
        scores = [code.multiplied(score, self._scale) for score in scores]
        seen = None
        if at is not None:
            first, behind = (code.splat(builder.trunc(self._inside(edge, at), WORD)) for edge in self._edges(row, row))
            lanes = ir.Constant(ir.VectorType(WORD, LANES), list(range(LANES)))
            places = [builder.add(lanes, code.all(SIDE * column, lanes)) for column in range(_COLUMNS)]
            seen = [
                builder.and_(builder.icmp_signed(">=", place, first), builder.icmp_signed("<", place, behind))
                for place in places
            ]
            scores = [builder.select(*each, _all(NEVER)) for each in zip(seen, scores, strict=True)]
        largest_at = code.at(self._largest, code.times(row, 4))
        before = code.load(largest_at, FLOAT)
        highest = code.larger(code.larger(*scores[:2]), code.larger(*scores[2:]))
        largest = code.larger(before, code.largest_of(highest))
        totals_at = self._line(self._totals, row, LANES)
        with builder.if_then(builder.fcmp_unordered("!=", before, largest), likely=False):
            kept = code.power_of_two(code.splat(builder.fsub(before, largest)))
            code.store(largest, largest_at)
            code.store(code.multiplied(code.floats(totals_at), kept), totals_at)
            sums = self._line(self._sums, row, form.head_dim)
            for d in range(0, 4 * form.head_dim, ROW_BYTES):
                code.store(code.multiplied(code.floats(code.at(sums, d)), kept), code.at(sums, d))
        weights = [code.power_of_two(builder.fsub(score, code.splat(largest))) for score in scores]
        if seen is not None:
            weights = [builder.select(*each, _all(0.0)) for each in zip(seen, weights, strict=True)]
        to = self._line(self._weights, place, TILES_BLOCK // 2)
        for column, weight in enumerate(weights):
            code.store(code.rounded(weight, flushes=True), code.at(to, 2 * SIDE * column))
        added = code.summed(code.summed(*weights[:2]), code.summed(*weights[2:]))
        code.store(code.summed(code.floats(totals_at), added), totals_at)

    def _multiply(self, rows: Value, depth: int, pairs: Value, sums: Value, columns: int, adds: bool) -> None:
        """Sixteen rows of `depth` bfloat16 numbers times tiles of pairs, as rows of so many float32 columns, or added
        to them.
        """
        code, tiles = self._code, self._tiles
        beside, stride = columns // SIDE, code.number(4 * columns)
        for begin in range(0, beside, len(_SUMS)):
            some = range(begin, min(begin + len(_SUMS), beside))
            for column in some:
                if adds:
                    tiles.load(_SUMS[column - begin], code.at(sums, column * ROW_BYTES), stride)
                else:
                    tiles.zero(_SUMS[column - begin])
            for step in range(depth // DEPTH):
                tiles.load(_LEFT, code.at(rows, step * ROW_BYTES), code.number(2 * depth))
                for column in some:
                    right = _RIGHT[column % len(_RIGHT)]
                    tiles.load(right, code.at(pairs, (step * beside + column) * TILE_BYTES), code.number(ROW_BYTES))
                    tiles.multiply(_SUMS[column - begin], _LEFT, right)
            for column in some:
                tiles.store(_SUMS[column - begin], code.at(sums, column * ROW_BYTES), stride)

    # ---- parts

    def _line(self, array: Value, row: Value, width: int) -> Value:
        """Where a row is, of so many float32 numbers or as many bytes."""
        return self._code.at(array, self._code.times(row, 4 * width))

    def _edges(self, first: Value, last: Value) -> tuple[Value, Value]:
        """The first position that a row sees, and the one behind the last that another sees; both grow with rows."""
        places = (
            self._code.at(edges, self._code.times(row, 8))
            for edges, row in ((self._seen_from, first), (self._seen_to, last))
        )
        begin, end = (self._code.load(place, LONG, align=8) for place in places)
        return begin, end

    def _inside(self, position: Value, at: Value) -> Value:
        """A position in the page that begins at another one, or the nearest of its edges."""
        code = self._code
        return code.smaller(code.greater(code.subtract(position, at), code.number(0)), code.number(TILES_BLOCK))


def _all(value: float) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, LANES), [value] * LANES)
