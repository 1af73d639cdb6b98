"""The requests that every engine gets."""

from __future__ import annotations

import random

from gpu_check.sizes import sizes


def prompts(vocab_size: int) -> list[list[int]]:
    """Random tokens, all prompts of one length: what static batches like best."""
    size, draw = sizes(), random.Random(0)
    return [[draw.randrange(10, vocab_size) for _ in range(size.input_len)] for _ in range(size.num_requests)]
