"""What the kernel of attention on CPUs (`cpu_kernel`) is called with.

Operands: queries, float32 [T, heads, head_dim], scaled; the cache; block tables i32 [groups, S, W]; where the layer is
and what is computed, i32 [6] (group, first page, window, first position that anybody sees, most queries of a sequence
that is computed, parts of a sequence); positions i32 [T]; of each query head the maximum and the sum that the softmax
begins with, float32 [2, heads]; the soft cap, float32 []; the first query of each sequence, i32 [S + 1]; which tokens
are valid, bool [T]; the scales of the pages, where they have some; where many queries are computed by AMX, the queries
before they were scaled, bfloat16 [T, heads, head_dim], and the scale, float32 [].

Results: i32 [UNIT * S * parts * groups of heads], which nobody writes or reads (the work is shared out along it, a
`UNIT` for each part of a sequence and group), and float32 [T, heads, head_dim], or the width of a value.

A group are the query heads of a KV head; of latents, some of all heads, which see the same page.
"""

from __future__ import annotations

from pallas_kernels.cpu_ffi.vectors import LONG, POINTER, WORD, Code, Value
from pallas_kernels.paged_attention.cpu_ffi import Form


class Operands:
    """Writes the code that finds them in a launch's table (`work_sharing`)."""

    def __init__(self, code: Code, table: Value, form: Form):
        self._code, self._table = code, table
        names = ("query", "cache", "tables", "where", "positions", "start", "softcap", "query_start", "valid")
        of_form = (("scales",) if form.is_scaled else ()) + (("whole", "scale") if form.by_tiles else ())
        names = (*names, *of_form, "shared", "result")
        self._places = {name: place for place, name in enumerate(names)}

    def data(self, name: str) -> Value:
        return self._code.load(self._code.at(self._table, 16 * self._places[name]), POINTER)

    def dim(self, name: str, i: int) -> Value:
        dims = self._code.load(self._code.at(self._table, 16 * self._places[name] + 8), POINTER)
        return self._code.load(self._code.at(dims, 8 * i), LONG)

    def integer(self, name: str, i: Value | int) -> Value:
        """An i32 number of an array, as i64."""
        code = self._code
        place = code.number(i) if isinstance(i, int) else i
        word = code.load(code.at(self.data(name), code.times(place, 4)), WORD)
        return code.builder.sext(word, LONG)
