"""What models of square pictures of one size do with them before the encoder: Gemma 3 and SigLIP squeeze them into the
square, CLIP cuts out the middle, LLaVA may put them on a square ground first.

The bytes are those of transformers' image processors on Pillow, which need torch; the encoder's program normalizes
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import IMAGE, Media, Room
from jaxllm.multimodal.pictures import MOST_DECODED, MOST_PIXELS, pillow, read_picture
from jaxllm.multimodal.processor import content_of, item_of, of_channels

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
#: Pillow's numbers of its filters
_BILINEAR, _BICUBIC = 2, 3
#: `image_processor_type` -> mean and deviation, filter, and whether the middle is cut out; as transformers has them
_KINDS = {
    "Gemma3ImageProcessor": (_HALF, _BILINEAR, False),
    "SiglipImageProcessor": (_HALF, _BICUBIC, False),
    "CLIPImageProcessor": (_CLIP, _BICUBIC, True),
    "LlavaImageProcessor": (_CLIP, _BICUBIC, True),
    "LlavaNextImageProcessor": (_CLIP, _BICUBIC, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareProcessor:
    """How one model's pictures are prepared."""

    patch_size: int
    merge_size: int
    #: vectors of every picture, of so many patches
    num_tokens: int
    num_patches: int
    #: pixels of a picture's side, and of what the encoder sees of it
    image_size: int
    seen_size: int
    #: of the shorter side before the middle is cut out; None: the whole picture is squeezed into the square
    shorter_side: int | None
    #: whether it is put on a square of this color first
    ground: tuple[int, ...] | None
    #: Pillow's number of a filter
    resample: int
    normal: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def of(
        cls,
        preprocessor: Mapping[str, Any],
        kind: str,
        *,
        image_size: int,
        patch_size: int,
        merge_size: int,
        num_tokens: int,
    ) -> SquareProcessor:
        """From preprocessor_config.json, {} where there is none, for a tower.

        Args:
            kind: what `image_processor_type` is where nothing is said.
            image_size, patch_size: pixels of a side.
            merge_size: patches of a side that become one vector.
            num_tokens: vectors of a picture.

        Raises:
            ValidationError: the two contradict each other, or something is asked for that is not done here.
        """
        kind = str(preprocessor.get("image_processor_type") or kind).removesuffix("Fast").removesuffix("Pil")
        if kind not in _KINDS:
            raise ValidationError(
                f"image_processor_type {kind!r} of preprocessor_config.json is not supported; supported: "
                f"{', '.join(_KINDS)}"
            )
        (mean, deviation), resample, crops = _KINDS[kind]
        given = {name: value for name, value in preprocessor.items() if value is not None}
        for name, only in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_pan_and_scan", False),
        ):
            if given.get(name, only) != only:
                raise ValidationError(f"{name}={given[name]} of preprocessor_config.json is not supported; {only} is")
        if abs(given.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValidationError(f"rescale_factor={given['rescale_factor']} of preprocessor_config.json must be 1/255")
        crops = given.get("do_center_crop", crops)
        shorter, name = None, "crop_size" if crops else "size"
        if crops:
            size = given.get("size", image_size)
            shorter = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
            if not isinstance(shorter, int) or shorter < image_size:
                raise ValidationError(
                    f"size={size} of preprocessor_config.json must have a shortest_edge of at least {image_size}"
                )
        square = given.get(name, image_size)
        sides = (square.get("height"), square.get("width")) if isinstance(square, Mapping) else (square, square)
        if sides != (image_size, image_size):
            raise ValidationError(
                f"{name}={square} of preprocessor_config.json differs from config.json's image_size={image_size}"
            )
        mean = of_channels("image_mean", given.get("image_mean"), mean)
        return cls(
            patch_size=patch_size,
            merge_size=merge_size,
            num_tokens=num_tokens,
            num_patches=(image_size // patch_size) ** 2,
            image_size=image_size,
            seen_size=image_size // patch_size * patch_size,
            shorter_side=shorter,
            ground=tuple(int(number * 255) for number in mean) if given.get("do_pad") else None,
            resample=checks.integer("resample of preprocessor_config.json", given.get("resample", resample)),
            normal=(mean, of_channels("image_std", given.get("image_std"), deviation)),
        )

    @property
    def most_tokens(self) -> int:
        return self.num_tokens

    def tokens_of(self, width: int, height: int) -> int:
        if self.shorter_side is not None and self.ground is None:
            longer, shorter = max(width, height), min(width, height)
            if int(self.shorter_side * longer / shorter) * self.shorter_side > MOST_PIXELS:
                raise ValidationError(
                    f"{width} x {height} pixels are too narrow: made {self.shorter_side} wide, they would be more than "
                    f"{MOST_PIXELS}. Cut a part out."
                )
        if self.ground is not None and max(width, height) ** 2 > MOST_PIXELS:
            raise ValidationError(
                f"{width} x {height} pixels are too long: the square that they are put on would have more than "
                f"{MOST_PIXELS}. Cut a part out, or make it smaller."
            )
        return self.num_tokens

    def tokens_within(self, width: int, height: int) -> int:
        return self.num_tokens

    def patches_of(self, num_tokens: int) -> int:
        return self.num_patches

    def with_options(self, options: Mapping[str, Any] | None) -> SquareProcessor:
        for name, value in (options or {}).items() if isinstance(options or {}, Mapping) else [(options, None)]:
            if (name, value) != ("do_pan_and_scan", False):
                raise ValidationError(
                    f"mm_processor_kwargs has {name!r:.80}, which is not supported: every picture of this model is "
                    f"{self.image_size} x {self.image_size} pixels, {self.num_tokens} tokens. Leave it out."
                )
        return self

    def check_room(self, size: tuple[int, int], frames: int, name: str, room: Room | None) -> None:
        try:
            self.tokens_of(*size)
        except ValidationError as error:
            raise ValidationError(f"{name}: {error}") from None
        if room is None:
            return
        if size[0] * size[1] > MOST_DECODED or self.num_tokens > min(room.tokens, room.item_tokens):
            raise ValidationError(
                f"{name} becomes {self.num_tokens} tokens, and {min(room.tokens, room.item_tokens)} are left for it of "
                "the maximum model length. Give fewer pictures, or start the engine with a larger max_model_len."
            )

    def image(self, given: Any, *, name: str = "image", uuid: str | None = None, room: Room | None = None) -> Media:
        """As `Processor.image`."""
        picture = read_picture(given, name)
        self.check_room(picture.size, 1, name, room)
        pixels = np.moveaxis(np.asarray(self._in_square(picture)), -1, 0)[None, :, : self.seen_size, : self.seen_size]
        item = item_of(
            pixels,
            uuid or content_of(picture),
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            num_tokens=self.num_tokens,
        )
        return Media(IMAGE, (item,))

    def _in_square(self, picture: Any) -> Any:
        """A picture of Pillow's of the size that the encoder takes."""
        if self.ground is not None and picture.width != picture.height:
            side = max(picture.size)
            square = pillow().new("RGB", (side, side), self.ground)
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        width = height = self.image_size
        if self.shorter_side is not None:
            longer = int(self.shorter_side * max(picture.size) / min(picture.size))
            width, height = self.shorter_side, longer
            if picture.width > picture.height:
                width, height = height, width
        picture = picture.resize((width, height), self.resample)
        if self.shorter_side is None:
            return picture
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return picture.crop((left, top, left + self.image_size, top + self.image_size))
