"""The host's copy of what every forward pass must know of each running request, kept by row; one step's part of it is
packed by fancy indexing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxllm.engine.step import AdmittedRequest, SchedulerOutput
from jaxllm.multimodal.items import PromptMedia


class Sequences(NamedTuple):
    """Of each sequence of a step, in the device's order, int [n]."""

    #: its entry in the step
    order: np.ndarray
    rows: np.ndarray
    #: its first token in the step, and the first of the next sequence
    first: np.ndarray
    end: np.ndarray
    #: with the step's tokens
    lengths: np.ndarray


class Rows:
    """What every forward pass needs of all rows: block tables and the tokens that the host knows.

    Attributes:
        tokens: int32, of each row those that it was admitted with.
        known: int [rows], how many these are.
    """

    def __init__(self, max_num_seqs: int, num_groups: int, table_width: int):
        self._tables = np.zeros((num_groups, max_num_seqs, table_width), np.int32)
        self.tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * max_num_seqs
        self.known = np.zeros(max_num_seqs, np.int64)
        #: row -> vectors of its prompt that are not all computed
        self._embeds: dict[int, np.ndarray] = {}
        #: row -> its prompt's pictures, and of each of its tokens up to the last one's the row of the encoder's cache
        self._media: dict[int, tuple[PromptMedia, np.ndarray]] = {}
        self._adapter_slots = np.full(max_num_seqs, -1, np.int32)
        #: of each row, `PromptMedia.rope_delta`, and the tokens of a prompt with pictures that it says something of
        self._rope_deltas, self._media_tokens = np.zeros((2, max_num_seqs), np.int32)

    def update(self, step: SchedulerOutput) -> None:
        """Take in who enters a row with a step, and the blocks that rows get."""
        for request in step.admitted:
            self._admit(request)
        for row, group, start, blocks in step.new_blocks:
            self._tables[group, row, start : start + len(blocks)] = blocks
        for row, start, encoded in step.encoded_parts:
            self._media[row][1][start : start + len(encoded)] = encoded

    def _admit(self, request: AdmittedRequest) -> None:
        row = request.row
        self._tables[:, row] = 0
        for group, blocks in enumerate(request.block_ids):
            self._tables[group, row, : len(blocks)] = blocks
        self.tokens[row] = np.asarray(request.token_ids, np.int32)
        self.known[row] = len(request.token_ids)
        self._adapter_slots[row] = request.adapter_slot
        self._embeds.pop(row, None)
        if request.prompt_embeds is not None:
            self._embeds[row] = request.prompt_embeds
        if request.media is not None:
            media, offsets = request.media, request.media.rope_offsets
            self._media[row] = media, np.zeros(media.stop, np.int32)
            self._rope_deltas[row] = media.rope_delta
            self._media_tokens[row] = media.stop if offsets is None else offsets.shape[1]
        elif self._media.pop(row, None) is not None:
            self._rope_deltas[row] = self._media_tokens[row] = 0

    def pack(self, step: SchedulerOutput, fields: Mapping[str, np.ndarray]) -> Sequences:
        """Fill the fields of `packing.forward_fields`."""
        rows = np.asarray(step.rows, np.int32)
        starts = np.asarray(step.starts, np.int32)
        # of several steps, the first
        counts = np.ones(len(rows), np.int32) if step.goes_on_alone else np.asarray(step.counts, np.int32)
        lengths = starts + counts
        # single tokens first, longest context first: neighbours share a tile, and a tile costs what its longest row
        # costs
        order = np.lexsort((-lengths, counts > 1))
        rows, starts, counts, lengths = rows[order], starts[order], counts[order], lengths[order]
        end = np.add.accumulate(counts, dtype=np.int32)
        first = end - counts
        n, total = len(rows), int(end[-1])
        fields["num_decodes"][...] = np.count_nonzero(counts == 1)
        fields["num_seqs"][...] = n
        if total == n:
            fields["token_seq"][:n] = first
            fields["positions"][:n] = starts
        else:
            fields["token_seq"][:total] = np.repeat(np.arange(n, dtype=np.int32), counts)
            fields["positions"][:total] = np.arange(total, dtype=np.int32) - np.repeat(first - starts, counts)
        fields["token_ids"][:total] = self._ids(rows, starts, counts, first, total)
        if self._media:
            self._pack_media(rows, starts, counts, first, total, fields)
        if step.uses_adapters:
            fields["adapter_slots"][:total] = np.repeat(self._adapter_slots[rows], counts)
            fields["adapter_slots"][total:] = -1
        fields["rows"][:n] = rows
        fields["query_start"][:n] = first
        fields["query_start"][n:] = total
        fields["kv_lens"][:n] = lengths
        for tables, packed in zip(self._tables, fields["block_tables"], strict=True):
            np.take(tables, rows, axis=0, out=packed[:n], mode="clip")
        return Sequences(order, rows, first, end, lengths)

    def _ids(self, rows, starts, counts, first, total) -> np.ndarray:
        ids = np.full(total, -1, np.int32)
        for i in (starts < self.known[rows]).nonzero()[0].tolist():
            known = self.tokens[rows[i]][starts[i] : starts[i] + counts[i]]
            ids[first[i] : first[i] + len(known)] = known
        return ids

    def _pack_media(self, rows, starts, counts, first, total, fields) -> None:
        """What tokens have of pictures: of generated ones their positions alone."""
        if (deltas := self._rope_deltas[rows]).any():
            fields["rope_offsets"][:, :total] = np.repeat(deltas, counts)
        for i in (starts < self._media_tokens[rows]).nonzero()[0].tolist():
            media, encoded = self._media[rows[i]]
            part = slice(starts[i], starts[i] + counts[i])
            known = encoded[part]
            fields["encoded_rows"][first[i] : first[i] + len(known)] = known
            if media.rope_offsets is not None:
                offsets = media.rope_offsets[:, part]
                fields["rope_offsets"][:, first[i] : first[i] + offsets.shape[1]] = offsets
            elif "picture_ends" in fields:
                ends = fields["picture_ends"][first[i] :]
                for item in media.items:
                    ends[max(item.start - part.start, 0) : max(min(item.stop, part.stop) - part.start, 0)] = item.stop

    def embeddings(self, found: Sequences, num_tokens: int) -> np.ndarray | None:
        """What prompts bring for a step's tokens, [num_tokens, hidden size], zeros for the others; None where there is
        nothing. Asked for once a step.
        """
        vectors = None
        if not self._embeds:
            return None
        for row, first, end, length in zip(*(x.tolist() for x in found[1:]), strict=True):
            prompt = self._embeds.get(row)
            if prompt is None:
                continue
            part = prompt[length - (end - first) : length]
            if vectors is None:
                # never reused: the device may read it in place
                vectors = np.zeros((num_tokens, prompt.shape[1]), prompt.dtype)
            vectors[first : first + len(part)] = part
            if length >= len(prompt):
                del self._embeds[row]
        return vectors
