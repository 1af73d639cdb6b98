"""Late chunking (Guenther et al. 2024, arXiv:2409.04701): a text is read as a whole, and embedded in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.pooling_outputs import LateChunk, LateChunkingMetadata


def chunks_of(offsets: Sequence[tuple[int, int]], chunk_size: int) -> LateChunkingMetadata:
    """The chunks of a text, from where in it each of its tokens is; special tokens are nowhere, (0, 0).

    Raises:
        ValidationError: the tokens do not stand in the text's order.
    """
    in_text = [offset for offset in offsets if offset[0] < offset[1]]
    if any(a[0] > b[0] or a[1] > b[1] for a, b in zip(in_text, in_text[1:], strict=False)):
        raise ValidationError("Token offsets are not in source-text order")
    chunks = []
    for first in range(0, len(offsets), chunk_size):
        end = min(first + chunk_size, len(offsets))
        own = [offset for offset in offsets[first:end] if offset[0] < offset[1]]
        chunks.append(LateChunk((first, end), (own[0][0], own[-1][1]) if own else None))
    return LateChunkingMetadata(chunk_size=chunk_size, input_tokens=len(offsets), chunks=chunks)


def chunk_embeddings(
    states: np.ndarray, chunks: LateChunkingMetadata, *, dimensions: int | None, normalize: bool
) -> np.ndarray:
    """f32 [chunks, dimensions]: the means of f32 [tokens, d], then cut, then of length 1 with `normalize`."""
    firsts = [chunk.token_range[0] for chunk in chunks.chunks]
    counts = np.diff([*firsts, len(states)])
    rows = (np.add.reduceat(states, firsts, axis=0, dtype=np.float32) / counts[:, None])[:, :dimensions]
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows.astype(np.float32)
