"""Attention of many queries of a sequence by Intel's AMX (`cpu_ffi.matrix_tiles`), as LLVM code: a part of the kernel
for CPUs (`cpu_kernel`) where pages hold bfloat16 numbers and keys as [head_dim, block_size].

Scores of a page are rows of queries times pairs of its keys' rows, and what is added to the sums are its weights,
rounded to bfloat16, times pairs of its values' rows. Pairs are written as tiles once for all rows. What a row's numbers
are added up from, and in which order, follows from its own context alone; single tokens are added up in another way.
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import DEPTH, ROW_BYTES, SIDE, TILE_BYTES, Tiles
from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.paged_attention.cpu_ffi import TILES_BLOCK, Form
from pallas_kernels.paged_attention.cpu_operands import Operands

NEVER = -1e30  # a score of what is not seen
#: column tiles of a page's scores
_COLUMNS = TILES_BLOCK // SIDE
#: tiles of sums, and the two that are multiplied, of which the second ones alternate
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), 4, (5, 6, 7)


class MatrixTile:
    """Writes the function (table, sequence, group, first token, tokens, behind): attention of up to
    `Form.tile_queries` tokens of a sequence, of the query heads of one group; none sees position `behind`, nor what
    lies behind it.

    A row is a query's query head, a query's heads one behind the other.
    """

    def __init__(self, made: ir.Module, form: Form):
        self._form = form
        self._code = code = Code(made, "matrix_tile", [POINTER, LONG, LONG, LONG, LONG, LONG])
        self.function = code.function
        given, seq, group, first, left, behind = code.arguments
        self._table = table = Operands(code, given, form)
        dim, queries = form.head_dim, form.tile_queries
        rows = queries * form.group
        self._sums, self._products, self._scores = (code.scratch(rows * size) for size in (dim, dim, TILES_BLOCK))
        self._query, self._weights = code.scratch(rows * dim // 2), code.scratch(rows * TILES_BLOCK // 2)
        self._keys, self._values = code.scratch(TILES_BLOCK * dim // 2), code.scratch(TILES_BLOCK * dim // 2)
        self._largest, self._totals, self._kept = (code.scratch(rows) for _ in range(3))
        self._seen_from, self._seen_to = code.scratch(2 * queries), code.scratch(2 * queries)
        self._tiles = Tiles(code)
        self._queries = code.smaller(left, code.number(queries))
        self._rows = code.times(self._queries, form.group)
        self._row_tiles = code.divided(code.add(self._rows, SIDE - 1), SIDE)

        groups = code.divided(table.dim("query", 1), form.group)
        group_of, page_offset, window, least = (table.integer("where", i) for i in range(4))
        self._tiles.configure(code.number(SIDE))
        self._begin(first, group, groups, window, least, behind)
        columns = code.times(code.add(code.times(group_of, table.dim("tables", 1)), seq), table.dim("tables", 2))
        begin, end = self._edge(self._seen_from, code.number(0)), self._edge(self._seen_to, self._last_query())
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
            self._score()
            self._weigh(at)
            self._add_values()
        self._tiles.release()
        self._end(first, group, groups)
        code.end()

    # ---- a tile's begin and end

    def _begin(self, first: Value, group: Value, groups: Value, window: Value, least: Value, behind: Value) -> None:
        """Put the queries together, and write what each sees, and where its softmax begins."""
        form, code, table = self._form, self._code, self._table
        numbers = form.group * form.head_dim
        starts = code.at(table.data("start"), code.times(group, 4 * form.group))
        totals = code.at(starts, code.times(groups, 4 * form.group))
        with code.loop(code.number(0), self._queries, 1) as queries:
            token = code.add(first, queries.index)
            end = code.smaller(code.add(table.integer("positions", token), 1), behind)
            code.builder.store(end, code.at(self._seen_to, code.times(queries.index, 8)), align=8)
            begin = code.greater(code.subtract(end, window), least)
            code.builder.store(begin, code.at(self._seen_from, code.times(queries.index, 8)), align=8)
            place = code.add(code.times(token, groups), group)
            source = code.at(table.data("whole"), code.times(place, 2 * numbers))
            to = code.at(self._query, code.times(queries.index, 2 * numbers))
            with code.loop(code.number(0), code.number(2 * numbers), ROW_BYTES) as vectors:
                code.store(code.bytes(code.at(source, vectors.index), ROW_BYTES), code.at(to, vectors.index))
            row = code.times(queries.index, form.group)
            with code.loop(code.number(0), code.number(form.group), 1) as heads:
                at, here = code.times(heads.index, 4), code.times(code.add(row, heads.index), 4)
                code.store(code.load(code.at(starts, at), FLOAT), code.at(self._largest, here))
                code.store(code.load(code.at(totals, at), FLOAT), code.at(self._totals, here))
        with code.loop(code.number(0), code.times(self._rows, form.head_dim), LANES) as vectors:
            code.store(_all(0.0), code.at(self._sums, code.times(vectors.index, 4)))

    def _end(self, first: Value, group: Value, groups: Value) -> None:
        """Write the results."""
        form, code = self._form, self._code
        numbers = form.group * form.head_dim
        with code.loop(code.number(0), self._queries, 1) as queries:
            place = code.add(code.times(code.add(first, queries.index), groups), group)
            result = code.at(self._table.data("result"), code.times(place, 4 * numbers))
            with code.loop(code.number(0), code.number(form.group), 1) as heads:
                row = code.add(code.times(queries.index, form.group), heads.index)
                total = code.load(code.at(self._totals, code.times(row, 4)), FLOAT)
                total = code.larger(total, ir.Constant(FLOAT, 1e-30))
                inverse = code.splat(code.builder.fdiv(ir.Constant(FLOAT, 1.0), total))
                sums = code.at(self._sums, code.times(row, 4 * form.head_dim))
                to = code.at(result, code.times(heads.index, 4 * form.head_dim))
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

    def _score(self) -> None:
        """Scores of all rows, of a page's positions."""
        self._multiply(self._query, self._form.head_dim, self._keys, TILES_BLOCK, self._scores)

    def _weigh(self, at: Value) -> None:
        """Make scores weights, and add these up; what was added before counts so much from now on."""
        code, builder = self._code, self._code.builder
        lanes = ir.Constant(ir.VectorType(WORD, LANES), list(range(LANES)))
        with code.loop(code.number(0), self._queries, 1) as queries:
            edges = [self._inside(self._edge(edge, queries.index), at) for edge in (self._seen_from, self._seen_to)]
            length = code.subtract(edges[1], edges[0])
            with builder.if_else(code.below(length, code.number(TILES_BLOCK))) as (some, all_positions):
                with some:
                    first, behind = (code.splat(builder.trunc(edge, WORD)) for edge in edges)
                    places = [builder.add(lanes, code.all(SIDE * column, lanes)) for column in range(_COLUMNS)]
                    after = [builder.icmp_signed(">=", place, first) for place in places]
                    before = [builder.icmp_signed("<", place, behind) for place in places]
                    self._weigh_rows(queries.index, list(map(builder.and_, after, before)))
                with all_positions:
                    self._weigh_rows(queries.index, None)

    def _weigh_rows(self, query: Value, seen: list[Value] | None) -> None:
        """Of a query's heads.

        Args:
            seen: the positions that it sees, of each vector of scores; None: all.
        """
        form, code, builder = self._form, self._code, self._code.builder
        scale = code.splat(code.load(self._table.data("scale"), FLOAT))

        def where_seen(vectors: list[Value], other: float) -> list[Value]:
            if seen is None:
                return vectors
            return [builder.select(*each, _all(other)) for each in zip(seen, vectors, strict=True)]

        with code.loop(code.number(0), code.number(form.group), 1) as heads:
            row = code.add(code.times(query, form.group), heads.index)
            place = code.times(row, 4)
            line = code.at(self._scores, code.times(row, 4 * TILES_BLOCK))
            scores = [code.floats(code.at(line, ROW_BYTES * column)) for column in range(_COLUMNS)]
            scores = where_seen([code.multiplied(score, scale) for score in scores], NEVER)
            before = code.load(code.at(self._largest, place), FLOAT)
            highest = code.larger(code.larger(*scores[:2]), code.larger(*scores[2:]))
            largest = code.larger(before, code.largest_of(highest))
            weights = [code.exp(builder.fsub(score, code.splat(largest))) for score in scores]
            weights = where_seen(weights, 0.0)
            to = code.at(self._weights, code.times(row, 2 * TILES_BLOCK))
            for column, weight in enumerate(weights):
                code.store(code.rounded_bfloat16(weight), code.at(to, 2 * SIDE * column))
            added = code.summed(code.summed(*weights[:2]), code.summed(*weights[2:]))
            kept = builder.extract_element(code.exp(code.splat(builder.fsub(before, largest))), ir.Constant(WORD, 0))
            total = code.load(code.at(self._totals, place), FLOAT)
            code.store(code.multiply_add(total, kept, code.sum_of(added)), code.at(self._totals, place))
            code.store(largest, code.at(self._largest, place))
            code.store(kept, code.at(self._kept, place))

    def _add_values(self) -> None:
        form, code = self._form, self._code
        self._multiply(self._weights, TILES_BLOCK, self._values, form.head_dim, self._products)
        with code.loop(code.number(0), self._rows, 1) as rows:
            kept = code.splat(code.load(code.at(self._kept, code.times(rows.index, 4)), FLOAT))
            line = code.times(rows.index, 4 * form.head_dim)
            sums, products = code.at(self._sums, line), code.at(self._products, line)
            for d in range(0, 4 * form.head_dim, ROW_BYTES):
                at = code.at(sums, d)
                code.store(code.multiply_add(code.floats(at), kept, code.floats(code.at(products, d))), at)

    def _multiply(self, rows: Value, depth: int, pairs: Value, columns: int, result: Value) -> None:
        """Rows of `depth` bfloat16 numbers times tiles of pairs, into rows of so many float32 columns."""
        code, tiles = self._code, self._tiles
        beside = columns // SIDE
        with code.loop(code.number(0), self._row_tiles, 1) as loop:
            left = code.at(rows, code.times(loop.index, SIDE * depth * 2))
            to = code.at(result, code.times(loop.index, SIDE * columns * 4))
            for begin in range(0, beside, len(_SUMS)):
                some = range(begin, min(begin + len(_SUMS), beside))
                for column in some:
                    tiles.zero(_SUMS[column - begin])
                for step in range(depth // DEPTH):
                    tiles.load(_LEFT, code.at(left, step * ROW_BYTES), code.number(2 * depth))
                    for column in some:
                        right = _RIGHT[column % len(_RIGHT)]
                        tiles.load(right, code.at(pairs, (step * beside + column) * TILE_BYTES), code.number(ROW_BYTES))
                        tiles.multiply(_SUMS[column - begin], _LEFT, right)
                for column in some:
                    tiles.store(_SUMS[column - begin], code.at(to, column * ROW_BYTES), code.number(4 * columns))

    # ---- parts

    def _last_query(self) -> Value:
        return self._code.subtract(self._queries, 1)

    def _edge(self, edges: Value, query: Value) -> Value:
        return self._code.load(self._code.at(edges, self._code.times(query, 8)), LONG, align=8)

    def _inside(self, position: Value, at: Value) -> Value:
        """A position in the page that begins at another one, or the nearest of its edges."""
        code = self._code
        return code.smaller(code.greater(code.subtract(position, at), code.number(0)), code.number(TILES_BLOCK))


def _all(value: float) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, LANES), [value] * LANES)
