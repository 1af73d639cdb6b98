"""Random pictures beside random prompts, as vLLM's dataset "random-mm" has them."""

from __future__ import annotations

import ast
import dataclasses
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.bench.options import BUCKETS
from jaxllm.bench.peers.protocol import Request
from jaxllm.bench.session import JaxLLMSession
from jaxllm.multimodal.items import IMAGE

if TYPE_CHECKING:
    from jaxllm.bench.datasets import BenchRequest


def with_pictures(
    requests: Sequence[BenchRequest], draw: random.Random, *, count: int, range_ratio: float, buckets: str
) -> list[BenchRequest]:
    """Requests with pictures of random sizes.

    Args:
        count: pictures of a request, drawn from [count (1 - range_ratio), count (1 + range_ratio)].
        buckets: a dict as Python writes it: (height, width, 1) -> its share.

    Raises:
        ValidationError: `buckets` is something else.
    """
    sizes = _sizes(buckets)
    low, high = math.floor(count * (1 - range_ratio)), math.ceil(count * (1 + range_ratio))
    made = []
    for request in requests:
        drawn = draw.choices(list(sizes), list(sizes.values()), k=draw.randint(low, high))
        pictures = tuple((width, height, draw.randrange(2**32)) for height, width in drawn)
        made.append(dataclasses.replace(request, pictures=pictures))
    return made


def _sizes(text: str) -> dict[tuple[int, int], float]:
    try:
        given = ast.literal_eval(text)
        sizes = {(int(height), int(width)): float(share) for (height, width, _), share in given.items()}
        frames = {frames for _, _, frames in given}
    except (ValueError, SyntaxError, TypeError, AttributeError):
        raise ValidationError(f"--random-mm-bucket-config must be such as {BUCKETS!r}, got {text!r:.120}") from None
    if frames - {1} or not sizes or min(sizes.values()) < 0 or sum(sizes.values()) <= 0 or min(map(min, sizes)) < 1:
        raise ValidationError(
            f"--random-mm-bucket-config must have pictures alone (1 frame), and shares, such as {BUCKETS!r}; got "
            f"{text!r:.120}"
        )
    return sizes


class PictureSession(JaxLLMSession):
    """A session whose prompts have pictures in front.

    Args:
        requests: those that it is asked for; pictures are found by a prompt's tokens.
    """

    def __init__(self, llm: Any, requests: Sequence[BenchRequest], *, detokenize: bool):
        super().__init__(llm, detokenize=detokenize)
        self._media = llm.engine.inputs.reader.media
        if self._media is None:
            raise ValidationError("--dataset-name random-mm needs a model that sees images.")
        self._mark = self._media.placeholder_ids(IMAGE)
        self._pictures = {request.prompt_token_ids: list(map(_picture, request.pictures)) for request in requests}

    def reset(self) -> None:
        super().reset()
        if self._media.cache is not None:
            self._media.cache.clear()

    def prompt(self, request: Request) -> dict[str, Any]:
        pictures = self._pictures[tuple(request[0])]
        if not pictures:
            return super().prompt(request)
        return {
            "prompt_token_ids": [*self._mark * len(pictures), *request[0]],
            "multi_modal_data": {IMAGE: pictures},
        }


def _picture(about: tuple[int, int, int]) -> np.ndarray:
    """Noise."""
    width, height, seed = about
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
