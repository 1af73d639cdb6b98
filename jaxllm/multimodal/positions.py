"""Positions of three axes in a prompt with pictures (Qwen2-VL, arXiv:2409.12191, section 2.1).

A text goes on by one on all axes. The vectors of an item have its beginning as their time (of a video: and a step for
each frame), and count rows and columns from it; what follows begins behind the longer side. What is generated goes on
behind the highest position of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.multimodal.items import Media


def rope_offsets(placed: Sequence[tuple[Media, int]], num_tokens: int, merge_size: int) -> tuple[np.ndarray, int]:
    """`PromptMedia.rope_offsets` and `rope_delta` of a prompt of so many tokens.

    Args:
        placed: what it holds, in its order, and where each begins.
        merge_size: patches of a merged one's side.
    """
    offsets = np.zeros((3, num_tokens), np.int32)
    place = position = highest = 0
    for media, start in placed:
        offsets[:, place:start] = position - place
        position += start - place
        grid, stop = media.items[0].grid, start + media.num_tokens
        rows, columns = grid.rows // merge_size, grid.columns // merge_size
        time, row, column = np.indices((len(media.items), rows, columns)).reshape(3, -1)
        time = (time * media.time_step).astype(np.int64)
        axes = np.stack([time, row, column]) + position
        offsets[:, start:stop] = axes - np.arange(start, stop)
        highest = max(highest, int(axes.max()))
        position += max(rows, columns)
        place = stop
    offsets[:, place:] = position - place
    highest = max(highest, position + num_tokens - place - 1)
    return offsets, highest + 1 - num_tokens
