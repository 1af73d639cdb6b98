"""The host's copy of what the device must know of each running request of a pooling engine."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxllm.api.pooling_params import PoolingParams
from jaxllm.engine.step import AdmittedRequest, SchedulerOutput
from jaxllm.runner.packing import Packing
from jaxllm.runner.rows import ForwardRows


@dataclasses.dataclass(slots=True)
class PooledEntry:
    """Where in a step's results one entry of its SchedulerOutput is."""

    seq: int
    #: of its tokens, when the request wants them all; None: it does not
    tokens: slice | None
    #: whether these are the last ones
    ends: bool
    #: what earlier chunks of the request left on the host
    pieces: list[np.ndarray]


@dataclasses.dataclass(slots=True)
class PackedPooling:
    """What one step uploads, and how to read what it returns."""

    buffer: np.ndarray  # int32, `pooling_packing`'s fields
    #: in the order of the SchedulerOutput's entries
    entries: list[PooledEntry]
    want_tokens: bool


class PoolingRows(ForwardRows):
    """State of all rows.

    Args:
        hidden_size: components of an embedding that nobody cut.
    """

    def __init__(self, max_num_seqs: int, num_groups: int, table_width: int, hidden_size: int):
        super().__init__(max_num_seqs, num_groups, table_width)
        self._hidden_size = hidden_size
        self._dimensions = np.zeros(max_num_seqs, np.int32)
        self._activate = np.zeros(max_num_seqs, np.int32)
        self._segment_starts = np.zeros(max_num_seqs, np.int32)
        self._wants_tokens = np.zeros(max_num_seqs, bool)
        #: a new list for every admission: a step that is still in flight keeps the list of its own
        self._pieces: list[list[np.ndarray]] = [[] for _ in range(max_num_seqs)]

    def admit(self, request: AdmittedRequest) -> None:
        super().admit(request)
        row, params = request.row, request.params
        assert isinstance(params, PoolingParams)
        self._dimensions[row] = params.dimensions or self._hidden_size
        self._activate[row] = bool(params.use_activation)
        start = params.segment_start
        self._segment_starts[row] = np.iinfo(np.int32).max if start is None else start
        self._wants_tokens[row] = params.wants_tokens
        self._pieces[row] = []

    def pack(self, step: SchedulerOutput, packing: Packing) -> PackedPooling:
        """Fill the buffer of a step; `packing` is its bucket's."""
        buffer = np.zeros(packing.size, np.int32)
        fields = packing.views(buffer)
        order, rows, first, end, _ = self.pack_forward(step, fields)
        n = len(order)
        for name, values in (
            ("dimensions", self._dimensions),
            ("activate", self._activate),
            ("segment_starts", self._segment_starts),
        ):
            fields[name][:n] = values[rows]
        entries: list[PooledEntry | None] = [None] * n
        wants = self._wants_tokens[rows]
        for seq, entry in enumerate(order.tolist()):
            tokens = slice(int(first[seq]), int(end[seq])) if wants[seq] else None
            entries[entry] = PooledEntry(seq, tokens, step.wanted[entry] > 0, self._pieces[rows[seq]])
        return PackedPooling(buffer, entries, bool(wants.any()))  # pyright: ignore[reportArgumentType]
