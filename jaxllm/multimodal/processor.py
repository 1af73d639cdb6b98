"""What all processors of pictures have in common: pixels are cut into patches, and content gets a name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import Grid, Media, MediaItem, Room

#: mean and deviation of each channel, where bytes are numbers from 0 to 1
Normal = tuple[tuple[float, ...], tuple[float, ...]]
#: of a side of the largest picture
_MOST_FORMS = 4096


class Processor(Protocol):
    """How one model's pictures are prepared. Those of videos have `video` besides, and the options of frames."""

    @property
    def normal(self) -> Normal:
        """What the encoder's program takes of bytes."""
        ...

    @property
    def merge_size(self) -> int:
        """Patches of a side that become one vector."""
        ...

    @property
    def most_tokens(self) -> int:
        """The most vectors that a picture of any size becomes."""
        ...

    def tokens_of(self, width: int, height: int) -> int:
        """Vectors that a picture of this size becomes. Raises ValidationError where it has a form that is not taken."""
        ...

    def tokens_within(self, width: int, height: int) -> int:
        """The most vectors that a picture becomes which is no wider and no higher."""
        ...

    def patches_of(self, num_tokens: int) -> int:
        """Patches of a picture that becomes so many vectors."""
        ...

    def with_options(self, options: Mapping[str, Any] | None) -> Processor:
        """This processor with `mm_processor_kwargs`. Raises ValidationError for what it does not know."""
        ...

    def check_room(self, size: tuple[int, int], frames: int, name: str, room: Room | None) -> None:
        """Raise ValidationError where a picture of a size, (width, height), or so many frames are too much."""
        ...

    def image(self, given: Any, *, name: str = "image", uuid: str | None = None, room: Room | None = None) -> Media:
        """A picture as the encoder takes it.

        Args:
            given: as `pictures.read_picture` takes it.
            name: of the picture, for errors.
            uuid: the caller's name of the content, in place of a hash of it.
            room: for what there is room; None: for all.

        Raises:
            ValidationError: it cannot be read, is too large, or has a form that the model does not take.
        """
        ...


def forms_within(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Of each form the largest picture, (width, height), that is no wider and no higher: smaller ones of that form are
    not made more of. Of sides that are longer than `_MOST_FORMS`, as many are taken.
    """
    for each in range(height, 0, -max(height // _MOST_FORMS, 1)):
        yield width, each
    for each in range(width, 0, -max(width // _MOST_FORMS, 1)):
        yield each, height


def item_of(
    frames: np.ndarray,
    content: str,
    *,
    patch_size: int,
    merge_size: int,
    num_tokens: int | None,
    order: np.ndarray | None = None,
) -> MediaItem:
    """An item of pixels, cut into patches.

    Args:
        frames: uint8 [times, channels, height, width], sides of whole merged patches.
        content: names what they show.
        num_tokens: vectors that it becomes; None: one for each merged patch.
        order: as `MediaItem` has it.
    """
    times, channels, height, width = frames.shape
    grid = Grid(height // patch_size, width // patch_size)
    cut = frames.reshape(
        times, channels, grid.rows // merge_size, merge_size, patch_size, grid.columns // merge_size, merge_size,
        patch_size,
    )  # fmt: skip
    pixels = cut.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(grid.num_patches, -1)
    return MediaItem(
        content_hash=hashlib.blake2b(f"{content} {grid}".encode(), digest_size=16).hexdigest(),
        grid=grid,
        num_tokens=grid.num_patches // merge_size**2 if num_tokens is None else num_tokens,
        pixels=pixels,
        order=order,
    )


def content_of(picture: Any) -> str:
    """A name of a picture of Pillow's, by its pixels."""
    return f"{picture.size} {hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()}"


def of_channels(name: str, given: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """A field of preprocessor_config.json that has a number for each channel."""
    found = tuple(checks.real(f"{name} of preprocessor_config.json", number) for number in given or default)
    if len(found) != len(default):
        raise ValidationError(f"{name} of preprocessor_config.json must have {len(default)} numbers, got {given!r:.80}")
    return found
