"""What Qwen2-VL and Qwen2.5-VL do with pictures before the encoder: resize, normalize, cut into patches.

The numbers are those of transformers' image processor on Pillow (`image_processing_pil_qwen2_vl`), which needs torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import IMAGE, Grid, MediaItem
from jaxllm.multimodal.pictures import pillow, read_picture

#: CLIP's (Radford et al. 2021, arXiv:2103.00020)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
#: the longer side is at most so many times the shorter one
_MOST_RATIO = 200
#: what stands for an item in a text
PLACEHOLDERS = {IMAGE: "<|vision_start|><|image_pad|><|vision_end|>"}
#: what a call, an engine or a prompt may say
PROCESSOR_KEYS = ("min_pixels", "max_pixels", "size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenProcessor:
    """How one model's pictures are prepared."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = _MEAN
    deviation: tuple[float, ...] = _DEVIATION

    @classmethod
    def of(cls, vision: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> QwenProcessor:
        """From `vision_config` of config.json and from preprocessor_config.json, {} where there is none.

        Raises:
            ValidationError: the two contradict each other, or a value is out of range.
        """
        sizes = {
            "patch_size": vision.get("patch_size", 14),
            "temporal_patch_size": vision.get("temporal_patch_size", 2),
            "merge_size": vision.get("spatial_merge_size", 2),
        }
        for name, value in sizes.items():
            if preprocessor.get(name, value) != value:
                raise ValidationError(
                    f"{name}={preprocessor[name]} of preprocessor_config.json differs from config.json's {value}"
                )
        size = preprocessor.get("size") or {}
        return cls(
            **sizes,
            min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
            max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
            mean=tuple(preprocessor.get("image_mean") or _MEAN),
            deviation=tuple(preprocessor.get("image_std") or _DEVIATION),
        )

    def with_options(self, options: Mapping[str, Any] | None) -> QwenProcessor:
        """This processor with `mm_processor_kwargs`.

        Raises:
            ValidationError: an unknown key, or a value out of range.
        """
        if not options:
            return self
        if not isinstance(options, Mapping):
            raise ValidationError(f"mm_processor_kwargs must be a dict, got {options!r:.80}")
        for name in options:
            if name not in PROCESSOR_KEYS:
                raise ValidationError(
                    f"mm_processor_kwargs has the key {name!r}, which is not supported; supported: "
                    f"{', '.join(PROCESSOR_KEYS)}"
                )
        size = options.get("size") or {}
        if not isinstance(size, Mapping) or set(size) - {"shortest_edge", "longest_edge"}:
            raise ValidationError(
                f"size of mm_processor_kwargs must have shortest_edge and longest_edge, in pixels, got {size!r:.80}"
            )
        least = options.get("min_pixels", size.get("shortest_edge", self.min_pixels))
        most = options.get("max_pixels", size.get("longest_edge", self.max_pixels))
        least, most = checks.integer("min_pixels", least), checks.integer("max_pixels", most)
        if not 1 <= least <= most:
            raise ValidationError(f"min_pixels={least} and max_pixels={most} must be at least 1, and in this order")
        return dataclasses.replace(self, min_pixels=least, max_pixels=most)

    @property
    def factor(self) -> int:
        """Pixels of a merged patch's side."""
        return self.patch_size * self.merge_size

    def tokens_of(self, width: int, height: int) -> int:
        """Vectors that a picture of this size becomes."""
        rows, columns = self.size_of(width, height)
        return rows * columns // self.factor**2

    @property
    def most_tokens(self) -> int:
        """The most vectors that a picture of any size becomes."""
        return max(self.max_pixels // self.factor**2, 1)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to: multiples of `factor`, about its form, within the bounds.

        Raises:
            ValidationError: it is too narrow.
        """
        if max(width, height) > _MOST_RATIO * min(width, height):
            raise ValidationError(
                f"absolute aspect ratio must be smaller than {_MOST_RATIO}, got "
                f"{max(width, height) / min(width, height):g} ({width} x {height} pixels)"
            )
        factor = self.factor
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return rows, columns

    def image(self, given: Any, *, name: str = "image", uuid: str | None = None) -> MediaItem:
        """A picture as the encoder takes it.

        Args:
            given: as `pictures.read_picture` takes it.
            name: of the picture, for errors.
            uuid: the caller's name of the content, in place of a hash of it.

        Raises:
            ValidationError: it cannot be read, or has a form that the model does not take.
        """
        picture = read_picture(given, name)
        try:
            height, width = self.size_of(*picture.size)
        except ValidationError as error:
            raise ValidationError(f"{name}: {error}") from None
        content = uuid if uuid is not None else _content(picture)
        if picture.size != (width, height):
            picture = picture.resize((width, height), pillow().Resampling.BICUBIC)
        frame = self._normalized(np.asarray(picture))
        frames = np.broadcast_to(frame[None], (self.temporal_patch_size, *frame.shape))
        return self._item(IMAGE, frames, content)

    def _normalized(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [3, height, width] of bytes [height, width, 3], rounded where transformers does."""
        scaled = (np.moveaxis(pixels, -1, 0).astype(np.float64) * (1 / 255)).astype(np.float32)
        mean, deviation = (np.asarray(x, np.float32)[:, None, None] for x in (self.mean, self.deviation))
        return (scaled - mean) / deviation

    def _item(self, modality: str, frames: np.ndarray, content: str, frame_step: float = 1.0) -> MediaItem:
        """Of frames float32 [frames, 3, height, width], a multiple of `temporal_patch_size` of them."""
        count, channels, height, width = frames.shape
        size, merge, together = self.patch_size, self.merge_size, self.temporal_patch_size
        grid = Grid(count // together, height // size, width // size)
        cut = frames.reshape(
            *(grid.frames, together, channels),
            *(grid.rows // merge, merge, size),
            *(grid.columns // merge, merge, size),
        )
        pixels = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.num_patches, -1)
        made = f"{modality} {content} {grid} {frame_step} {self}"
        return MediaItem(
            modality=modality,
            content_hash=hashlib.blake2b(made.encode(), digest_size=16).hexdigest(),
            grid=grid,
            num_tokens=grid.num_patches // merge**2,
            pixels=pixels,
            frame_step=frame_step,
        )


def _content(picture: Any) -> str:
    digest = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
    return f"{picture.size} {digest}"
