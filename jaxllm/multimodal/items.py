"""A picture on its way through the engine: what it is, where in a prompt it stands, and what the device needs of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

IMAGE, VIDEO = "image", "video"


class Grid(NamedTuple):
    """Patches of an item: rows and columns."""

    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MediaItem:
    """A picture, or the frames of a video that are one patch deep, as the encoder takes it: nothing of a video sees
    another time of it there.
    """

    #: of the pixels and of all that was done with them: equal items have equal vectors
    content_hash: str
    grid: Grid
    #: vectors of the language model that it becomes
    num_tokens: int
    #: uint8 [patches, numbers of a patch], in the order in which patches are merged; many pictures may wait, and bytes
    #: take a fourth of what the numbers do that the device makes of them
    pixels: np.ndarray
    #: i32 [num_tokens], of each which of the encoder's vectors it is, -1: the one that ends a row (LLaVA-NeXT); None:
    #: one after the other
    order: np.ndarray | None = None


class Media(NamedTuple):
    """What a caller gives as one picture or one video."""

    #: `IMAGE` or `VIDEO`
    modality: str
    #: one after the other in time, of equal grids; a picture is one
    items: tuple[MediaItem, ...]
    #: positions of time from one to the next
    time_step: float = 1.0

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    def fits(self, room: Room) -> bool:
        """Whether there is room for its vectors."""
        return self.num_tokens <= room.tokens and self.items[0].num_tokens <= room.item_tokens


class Room(NamedTuple):
    """What there is room for; a reader looks before it unfolds pixels, which take far more than a file's bytes."""

    #: vectors of a picture, or of the frames of a video that are one patch deep
    item_tokens: int
    #: vectors of what else the prompt may hold
    tokens: int
    #: of a video
    frames: int | None = None


class PlacedItem(NamedTuple):
    """An item in a prompt: its vectors stand in place of the tokens from `start` to before `stop`."""

    item: MediaItem
    start: int
    stop: int
    #: what keys and values of these tokens depend on besides the tokens
    key: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PromptMedia:
    """What a prompt holds besides tokens."""

    #: in the order of the prompt
    items: tuple[PlacedItem, ...]
    #: i32 [3, tokens of the prompt]: the positions of each on three axes, less its place; None: places are positions
    rope_offsets: np.ndarray | None = None
    #: the same of all tokens that are generated, on every axis
    rope_delta: int = 0

    @property
    def stop(self) -> int:
        """The place behind the last item."""
        return self.items[-1].stop


class HeldMedia:
    """What a request has of the encoder's cache, besides what its prompt holds."""

    __slots__ = ("media", "new", "rows")

    def __init__(self, media: PromptMedia) -> None:
        self.media = media
        #: number of an item in the prompt -> its rows, while the request uses them
        self.rows: dict[int, np.ndarray] = {}
        #: of these, those that the runner has not been told of
        self.new: list[int] = []


class EncoderInput(NamedTuple):
    """An item for the encoder, and the rows of its cache that the vectors go to, i32 [num_tokens]."""

    item: MediaItem
    rows: np.ndarray


class EncodedPart(NamedTuple):
    """Where the encoder's cache has the vectors of the tokens from `start` on of the request in a row."""

    row: int
    start: int
    rows: np.ndarray
