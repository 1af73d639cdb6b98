"""What Qwen2-VL and Qwen2.5-VL do with pictures before the encoder: resize them and cut them into patches.

The bytes are those of transformers' image processor on Pillow (`image_processing_pil_qwen2_vl`), which needs torch; the
encoder's program normalizes them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import IMAGE, VIDEO, Media, MediaItem, Room
from jaxllm.multimodal.pictures import MOST_DECODED, MOST_PIXELS, pillow, read_picture
from jaxllm.multimodal.processor import content_of, forms_within, item_of, of_channels
from jaxllm.multimodal.video_files import VideoFile, open_video

#: CLIP's (Radford et al. 2021, arXiv:2103.00020)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
#: the longer side is at most so many times the shorter one
_MOST_RATIO = 200
#: positions, which are 32 bits
_MOST_TIME = 2**30
#: what a call, an engine or a prompt may say
PROCESSOR_KEYS = ("min_pixels", "max_pixels", "size", "fps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenProcessor:
    """How one model's pictures are prepared."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    #: of each channel of what the encoder takes, where bytes are numbers from 0 to 1
    mean: tuple[float, ...] = _MEAN
    deviation: tuple[float, ...] = _DEVIATION
    #: positions of time in a second of video; None: each patch is one
    tokens_per_second: float | None = None
    #: frames in a second of video, where nobody says
    fps: float = 2.0

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
            mean=of_channels("image_mean", preprocessor.get("image_mean"), _MEAN),
            deviation=of_channels("image_std", preprocessor.get("image_std"), _DEVIATION),
            tokens_per_second=vision.get("tokens_per_second"),
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
        bound = max(MOST_PIXELS, self.max_pixels)
        if not 1 <= least <= most <= bound:
            raise ValidationError(
                f"min_pixels={least!r:.40} and max_pixels={most!r:.40} must be at least 1, in this order, and at most "
                f"{bound}"
            )
        fps = checks.real("fps", options.get("fps", self.fps))
        if not fps > 0:
            raise ValidationError(f"fps must be above 0, got {fps}")
        return dataclasses.replace(self, min_pixels=least, max_pixels=most, fps=fps)

    @property
    def factor(self) -> int:
        """Pixels of a merged patch's side."""
        return self.patch_size * self.merge_size

    @property
    def normal(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel."""
        return self.mean, self.deviation

    def tokens_of(self, width: int, height: int) -> int:
        """Vectors that a picture of this size becomes."""
        rows, columns = self.size_of(width, height)
        return rows * columns // self.factor**2

    def tokens_within(self, width: int, height: int) -> int:
        """The most vectors that a picture becomes which is no wider and no higher."""
        forms = (form for form in forms_within(width, height) if max(form) <= _MOST_RATIO * min(form))
        counts = [self.tokens_of(*form) for form in forms]
        return max(*counts, self._most_grown(min(max(width, height), _MOST_RATIO))) if counts else self.most_tokens

    def patches_of(self, num_tokens: int) -> int:
        """Patches of a picture that becomes so many vectors."""
        return num_tokens * self.merge_size**2

    @property
    def most_tokens(self) -> int:
        """The most vectors that a picture of any size becomes, unless it is so narrow that `max_pixels` are no row."""
        return max(self.max_pixels // self.factor**2, self._most_grown(_MOST_RATIO))

    def _most_grown(self, ratio: float) -> int:
        """The most vectors of a picture that has to grow to `min_pixels`, one side of which is up to `ratio` times the
        other: both are rounded up, whatever they are in pixels.
        """
        area = self.min_pixels / self.factor**2
        least = math.sqrt(area / ratio)
        sides = range(max(math.ceil(least), 1), math.floor(math.sqrt(area)) + 2)
        # a little more than a side that is whole may be rounded up as well
        return max(side * math.ceil(area / max(side - 1, least) + 1e-6) for side in sides)

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

    def image(self, given: Any, *, name: str = "image", uuid: str | None = None, room: Room | None = None) -> Media:
        """As `Processor.image`."""
        picture = read_picture(given, name)
        self.check_room(picture.size, 1, name, room)
        pixels = self._resized(picture)
        return Media(IMAGE, (self._item([pixels], uuid or content_of(picture)),))

    def video(self, given: Any, *, name: str = "video", uuid: str | None = None, room: Room | None = None) -> Media:
        """Frames as the encoder takes them, `temporal_patch_size` of them together; the last is repeated.

        Args:
            given: an array [frames, height, width, 3], a list of pictures of one size, or a pair of these and of what
                is known of them: {"fps": 2.0}; or a file's path or bytes, of which `fps` frames a second are taken.
            name, uuid, room: as of `image`.

        Raises:
            ValidationError: it is something else, is too large, or has a form that the model does not take.
        """
        fps = self.fps
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            given, about = given
            fps = checks.real(f"fps of {name}", about.get("fps") or fps)
        together = self.temporal_patch_size
        if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview):
            most = None if room is None else room.frames
            given = open_video(given, name, fps=fps, together=together, most_frames=most)  # pyright: ignore
            fps = given.fps
        kinds = (list, tuple, np.ndarray, VideoFile)
        if not isinstance(given, kinds) or (isinstance(given, np.ndarray) and given.ndim != 4):
            raise ValidationError(
                f"{name} must be an array [frames, height, width, 3], a list of pictures, a path or a file's bytes, "
                f"got {type(given).__name__}: {given!r:.80}"
            )
        if not len(given):
            raise ValidationError(f"{name} has no frames")
        if room is not None and room.frames is not None and len(given) > room.frames:
            raise ValidationError(
                f"{name} has {len(given)} frames, and num_frames of limit_mm_per_prompt allows {room.frames}. Give "
                "fewer, or start the engine with more."
            )
        size = None
        step = 1.0 if self.tokens_per_second is None else self.tokens_per_second * together / max(fps, 1e-300)
        if not fps > 0 or step * len(given) > _MOST_TIME:
            raise ValidationError(
                f"fps of {name} must be above 0, and its time at most {_MOST_TIME} positions, got {fps}"
            )
        items: list[MediaItem] = []
        # a frame at a time: as they come they take far more than what is kept of them
        waiting: list[tuple[np.ndarray, str]] = []
        for number, frame in enumerate(given):
            picture = read_picture(frame, f"frame {number} of {name}")
            if size is None:
                size = picture.size
                self.check_room(size, len(given), name, room)
            elif picture.size != size:
                raise ValidationError(f"{name} must have frames of one size, got {size} and {picture.size}")
            # which frames of a file are taken follows from fps
            place = given.places[number] if isinstance(given, VideoFile) else number
            waiting.append((self._resized(picture), f"{uuid} frame {place}" if uuid else content_of(picture)))
            if number == len(given) - 1:
                waiting += waiting[-1:] * (together - len(waiting))
            if len(waiting) == together:
                frames, contents = zip(*waiting, strict=True)
                items.append(self._item(list(frames), " ".join(contents)))
                waiting.clear()
        return Media(VIDEO, tuple(items), step)

    def check_room(self, size: tuple[int, int], frames: int, name: str, room: Room | None) -> None:
        """Raise ValidationError where a picture of a size, (width, height), or so many frames are too much."""
        count = -(-frames // self.temporal_patch_size)
        try:
            each = self.tokens_of(*size)
        except ValidationError as error:
            raise ValidationError(f"{name}: {error}") from None
        if room is None:
            return
        if size[0] * size[1] * frames > MOST_DECODED:
            raise ValidationError(
                f"{name} has {frames} frames of {size[0]} x {size[1]} pixels, and at most {MOST_DECODED} are decoded. "
                "Make them smaller first."
            )
        if each > room.item_tokens:
            raise ValidationError(
                f"{name} becomes {each} tokens{' for every two frames' if count > 1 else ''}, and the engine has "
                f"planned for {room.item_tokens} an item. Pass "
                f'mm_processor_kwargs={{"max_pixels": {room.item_tokens * self.factor**2}}}, or start the engine with '
                "larger sizes in limit_mm_per_prompt, or a larger max_model_len."
            )
        if each * count > room.tokens:
            raise ValidationError(
                f"{name} becomes {each * count} tokens, and {room.tokens} are left for it of the maximum model length. "
                'Give fewer, pass mm_processor_kwargs={"max_pixels": ...}, or start the engine with a larger '
                "max_model_len."
            )

    def _resized(self, picture: Any) -> np.ndarray:
        """uint8 [3, height, width] of a picture, in the size that the model sees."""
        height, width = self.size_of(*picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), pillow().Resampling.BICUBIC)
        return np.moveaxis(np.asarray(picture), -1, 0)

    def _item(self, frames: list[np.ndarray], content: str) -> MediaItem:
        """Of frames uint8 [3, height, width]: `temporal_patch_size` of them, or one that is repeated."""
        whole = np.stack(frames * (self.temporal_patch_size // len(frames)))
        return item_of(whole, content, patch_size=self.patch_size, merge_size=self.merge_size, num_tokens=None)
