"""What tests of pictures need of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from support.seeing_models import IMAGE, VIDEO, VISION

from jaxllm.config.media import media_limits
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.items import MediaItem
from jaxllm.multimodal.marks import QWEN
from jaxllm.multimodal.processor_cache import ProcessorCache
from jaxllm.multimodal.prompts import MediaReader
from jaxllm.multimodal.qwen_processor import QwenProcessor

PROCESSOR = QwenProcessor.of(VISION["qwen2_5_vl"], {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64})


def reader(max_model_len: int = 1000, *, cache: ProcessorCache | None = None, **limits: Any) -> MediaReader:
    return reader_of({"image": PROCESSOR, "video": PROCESSOR}, max_model_len, cache=cache, **limits)


def reader_of(
    processors: dict[str, Any],
    max_model_len: int = 1000,
    *,
    max_tokens: int = 64,
    cache: ProcessorCache | None = None,
    **limits: Any,
) -> MediaReader:
    """Of some modalities."""
    return MediaReader(
        processors,
        {name: token for name, token in (("image", IMAGE), ("video", VIDEO)) if name in processors},
        media_limits("limits", limits),
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        access=MediaAccess(domains=["127.0.0.1"]),
        marks=QWEN,
        has_axes=True,
        cache=cache,
    )


def normal(item: MediaItem) -> np.ndarray:
    """What the tower takes."""
    mean, deviation = (np.asarray(numbers)[:, None] for numbers in PROCESSOR.normal)
    return ((item.pixels.reshape(len(item.pixels), 3, -1) / 255 - mean) / deviation).reshape(item.pixels.shape)


def encoded(image: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def broken(data: bytes, random: np.random.Generator) -> bytes:
    """A file that may end early, with a few wrong bytes."""
    found = bytearray(data[: random.integers(1, len(data) + 1)])
    for place in random.integers(0, len(found), 4):
        found[place] = random.integers(256)
    return bytes(found)
