"""What LLaVA-NeXT does with pictures before the encoder: each is squeezed into a square, and put on a ground of tiles.

The bytes are those of transformers' image processor on Pillow (`image_processing_pil_llava_next`); which vectors stand
in a prompt is what its model keeps of them (`pack_image_features`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import IMAGE, Media, Room
from jaxllm.multimodal.pictures import pillow, read_picture
from jaxllm.multimodal.processor import Normal, content_of, forms_within, item_of
from jaxllm.multimodal.square_processor import SquareProcessor

#: in `MediaItem.order`, the vector that ends a row
NEWLINE = -1


class _Part(NamedTuple):
    """Of the tiles' vectors, those that the picture became, and not the ground behind it."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def num_tokens(self) -> int:
        """With one at each row's end."""
        return (self.bottom - self.top) * (self.right - self.left + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileProcessor:
    """How one model's pictures are prepared.

    Args:
        square: how one square is.
        grids: rows and columns of tiles that there are.
        most_tiles: those of a picture; more are refused.
    """

    square: SquareProcessor
    grids: tuple[tuple[int, int], ...]
    most_tiles: int

    @classmethod
    def of(
        cls, square: SquareProcessor, grids: tuple[tuple[int, int], ...], largest: tuple[int, int] | None
    ) -> TileProcessor:
        """
        Args:
            largest: (width, height) that no picture is wider or higher than; None: any.

        Raises:
            ValidationError: squares are cut out of larger ones.
        """
        if square.shorter_side not in (None, square.image_size):
            raise ValidationError(
                f"size={square.shorter_side} of preprocessor_config.json must be {square.image_size}, which a tile has"
            )
        square = dataclasses.replace(square, shorter_side=None)
        found = cls(square=square, grids=grids, most_tiles=max(rows * columns for rows, columns in grids))
        if largest is None:
            return found
        most = max(math.prod(found._grid(*form)) for form in forms_within(*largest))
        return dataclasses.replace(found, most_tiles=most)

    @property
    def normal(self) -> Normal:
        return self.square.normal

    @property
    def merge_size(self) -> int:
        return 1

    @property
    def side(self) -> int:
        """Vectors of a square's side."""
        return self.square.image_size // self.square.patch_size

    @property
    def most_tokens(self) -> int:
        forms = (_Part(0, rows * self.side, 0, columns * self.side) for rows, columns in self.grids
                 if rows * columns <= self.most_tiles)  # fmt: skip
        return self.side**2 + max(form.num_tokens for form in forms)

    def tokens_of(self, width: int, height: int) -> int:
        return self.side**2 + self._part(width, height).num_tokens

    def tokens_within(self, width: int, height: int) -> int:
        # a smaller picture of another form may fill more of as many tiles, which `largest` has bounded already
        return self.most_tokens

    def patches_of(self, num_tokens: int) -> int:
        return (1 + self.most_tiles) * self.side**2

    def with_options(self, options: Mapping[str, Any] | None) -> TileProcessor:
        for name in (options or {}) if isinstance(options or {}, Mapping) else [options]:
            raise ValidationError(
                f"mm_processor_kwargs has {name!r:.80}, which is not supported: how this model's pictures are cut into "
                f"tiles of {self.square.image_size} x {self.square.image_size} pixels is in its config.json. Leave it "
                "out."
            )
        return self

    def check_room(self, size: tuple[int, int], frames: int, name: str, room: Room | None) -> None:
        tiles = math.prod(self._grid(*size))
        if tiles > self.most_tiles:
            raise ValidationError(
                f"{name} of {size[0]} x {size[1]} pixels becomes {tiles} tiles, and the engine has planned for "
                f"{self.most_tiles}. Set the size in limit_mm_per_prompt to {size[0]} x {size[1]}, or give a smaller "
                "picture."
            )
        own = dataclasses.replace(self.square, num_tokens=self.tokens_of(*size))
        own.check_room(size, frames, name, room)

    def image(self, given: Any, *, name: str = "image", uuid: str | None = None, room: Room | None = None) -> Media:
        """As `Processor.image`."""
        picture = read_picture(given, name)
        self.check_room(picture.size, 1, name, room)
        seen = self.square.seen_size
        squares = [np.asarray(square)[:seen, :seen] for square in self._squares(picture)]
        order = self._order(*picture.size)
        item = item_of(
            np.moveaxis(np.concatenate(squares), -1, 0)[None],
            # of one name, pictures of two sizes may have other vectors of the same squares
            f"{uuid or content_of(picture)} of {picture.size}",
            patch_size=self.square.patch_size,
            merge_size=1,
            num_tokens=len(order),
            order=order,
        )
        return Media(IMAGE, (item,))

    def _squares(self, picture: Any) -> list[Any]:
        """Of a picture of Pillow's: the whole, then tile after tile."""
        size, resample = self.square.image_size, self.square.resample
        rows, columns = self._grid(*picture.size)
        width, height = columns * size, rows * size
        by_width, by_height = width / picture.width, height / picture.height
        if by_width < by_height:
            inner = width, min(math.ceil(picture.height * by_width), height)
        else:
            inner = min(math.ceil(picture.width * by_height), width), height
        ground = pillow().new("RGB", (width, height))
        ground.paste(picture.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        corners = ((column * size, row * size) for row in range(rows) for column in range(columns))
        tiles = [ground.crop((left, top, left + size, top + size)) for left, top in corners]
        return [picture.resize((size, size), resample), *tiles]

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """The rows and columns of tiles that keep most of a picture, and of those the fewest."""
        size = self.square.image_size

        def rank(grid: tuple[int, int]) -> tuple[int, int]:
            ground_height, ground_width = grid[0] * size, grid[1] * size
            scale = min(ground_width / width, ground_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - ground_height * ground_width

        return max(self.grids, key=rank)

    def _part(self, width: int, height: int) -> _Part:
        rows, columns = (number * self.side for number in self._grid(width, height))
        if width / height > columns / rows:
            above = (rows - int(round(height * (columns / width), 7))) // 2
            return _Part(above, rows - above, 0, columns)
        beside = (columns - int(round(width * (rows / height), 7))) // 2
        return _Part(0, rows, beside, columns - beside)

    def _order(self, width: int, height: int) -> np.ndarray:
        """`MediaItem.order`."""
        part, side, columns = self._part(width, height), self.side, self._grid(width, height)[1]
        row, column = np.indices((part.bottom - part.top, part.right - part.left), dtype=np.int32)
        row, column = row + part.top, column + part.left
        tile = 1 + row // side * columns + column // side
        vectors = (tile * side + row % side) * side + column % side
        of_tiles = np.pad(vectors, ((0, 0), (0, 1)), constant_values=NEWLINE).reshape(-1)
        return np.concatenate([np.arange(side**2, dtype=np.int32), of_tiles])
