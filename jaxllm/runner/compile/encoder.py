"""The programs that encode pictures, in buckets of patches, and what a launch of one brings.

An item is encoded by itself, so that its vectors do not depend on what else there is; they go to rows of the cache of
encoded items, which is donated, and stay on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.layers.context import Context
from jaxllm.layers.vision import Patches
from jaxllm.models.qwen_vision import VisionConfig, VisionParams, encode
from jaxllm.multimodal.items import EncoderInput, Grid
from jaxllm.runner.packing import Packing

ENCODE = "encode"
#: patches of the smallest bucket; each is twice as large as the one before
SMALLEST = 64


def encoder_buckets(max_patches: int, merge_unit: int, *, eager: bool = False) -> tuple[int, ...]:
    """Patches of each program, ascending; the last one holds the largest item.

    Args:
        merge_unit: patches that become one vector, of which each bucket has whole ones.
        eager: only every other one.
    """
    smallest = -(-SMALLEST // merge_unit) * merge_unit
    sizes, size = [], smallest
    while size < max_patches:
        sizes.append(size)
        size *= 4 if eager else 2
    return (*sizes, max(-(-max_patches // smallest) * smallest, smallest))


def encoder_packing(num_patches: int, merge_unit: int) -> Packing:
    """What the program of a bucket reads besides pixels; `rows` 0 is where padding goes."""
    each = (num_patches,)
    return Packing(
        {"positions": (num_patches, 2), "frames": each, "windows": each, "rows": (num_patches // merge_unit,)}
    )


def encode_step(
    context: Context,
    config: VisionConfig,
    packing: Packing,
    params: VisionParams,
    cache: jax.Array,
    pixels: jax.Array,
    words: jax.Array,
) -> jax.Array:
    """The cache of encoded items [rows, d], donated, with the vectors of an item.

    Args:
        context, config, packing: static.
        pixels: [N, numbers of a patch].
        words: i32, the fields of `encoder_packing`.
    """
    fields = packing.unpack(words)
    patches = Patches(positions=fields["positions"], frames=fields["frames"], windows=fields["windows"])
    vectors = encode(context, config, params, pixels, patches)
    return cache.at[fields["rows"]].set(vectors.astype(cache.dtype))


class EncoderPrograms:
    """How they are lowered, and what they are launched with.

    Args:
        config: of the tower.
        buckets: patches of each program.
        params, cache: trees of `jax.ShapeDtypeStruct` with shardings.
        rows, words, lower: `Programs._rows`, `Programs._words` and `Programs._lowered`.
    """

    def __init__(
        self,
        context: Context,
        config: VisionConfig,
        buckets: tuple[int, ...],
        params: VisionParams,
        cache: jax.ShapeDtypeStruct,
        rows: Callable[..., jax.ShapeDtypeStruct],
        words: Callable[[int], jax.ShapeDtypeStruct],
        lower: Callable[..., Any],
    ):
        self._context, self._config, self._params, self._cache = context, config, params, cache
        self._rows, self._words, self._lower = rows, words, lower
        self.packings = {size: encoder_packing(size, config.merge_unit) for size in buckets}
        self.keys = tuple((ENCODE, size) for size in buckets)
        self.dtype = np.dtype(params.patch_embedding.dtype)

    def lowerings(self) -> Mapping[str, Callable[[int], jax.stages.Lowered]]:
        """What lowers the program of a bucket."""
        return {ENCODE: self._lower_encode}

    def _lower_encode(self, size: int) -> jax.stages.Lowered:
        packing = self.packings[size]
        function = functools.partial(encode_step, self._context, self._config, packing)
        pixels = self._rows(self.dtype, size, self._config.patch_numbers)
        args = self._params, self._cache, pixels, self._words(packing.size)
        return self._lower(function, *args, donate=1, out=getattr(self._cache.sharding, "spec", jax.P()))

    def bucket(self, num_patches: int) -> int:
        """The one that an item of so many patches is encoded in."""
        return next(size for size in self.packings if size >= num_patches)

    def pack(self, given: EncoderInput) -> tuple[int, np.ndarray, np.ndarray]:
        """(bucket, pixels, words) of an item."""
        config, grid = self._config, given.item.grid
        size = self.bucket(grid.num_patches)
        order, windows = window_order(grid, config)
        unit = config.merge_unit
        patches = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        # never reused: the device may read them in place
        pixels = np.zeros((size, config.patch_numbers), self.dtype)
        pixels[: len(patches)] = given.item.pixels[patches]
        packing = self.packings[size]
        words = np.zeros(packing.size, np.int32)
        fields = packing.views(words)
        frame, positions = patch_places(grid, config.merge_size)
        fields["positions"][: len(patches)] = positions[patches]
        for name, groups in (("frames", frame[patches]), ("windows", np.repeat(windows, unit))):
            fields[name][: len(patches)] = groups
            fields[name][len(patches) :] = -1
        fields["rows"][: len(order)] = given.rows[order]
        return size, pixels, words

    def nothing(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, words) of padding alone."""
        return np.zeros((size, self._config.patch_numbers), self.dtype), np.zeros(self.packings[size].size, np.int32)


def patch_places(grid: Grid, merge_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(frame i32 [N], row and column i32 [N, 2]) of each patch, in the order in which they are merged."""
    shape = grid.frames, grid.rows // merge_size, merge_size, grid.columns // merge_size, merge_size
    frame, row, inner_row, column, inner_column = np.indices(shape, dtype=np.int32).transpose(0, 1, 2, 4, 3, 5)
    places = np.stack([row * merge_size + inner_row, column * merge_size + inner_column], axis=-1)
    return frame.reshape(-1), places.reshape(-1, 2)


def window_order(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """The merged patches of an item window after window, and the window of each in this order: int [N / merge_unit]
    each. Windows at the edges are smaller; without windows the order stays.
    """
    rows, columns = grid.rows // config.merge_size, grid.columns // config.merge_size
    count = grid.frames * rows * columns
    if not config.has_windows:
        return np.arange(count), np.zeros(count, np.int32)
    side = config.window_side
    frame, row, column = np.indices((grid.frames, rows, columns), dtype=np.int32).reshape(3, -1)
    across, down = -(-columns // side), -(-rows // side)
    window = (frame * down + row // side) * across + column // side
    order = np.argsort(window, kind="stable")
    return order, window[order]
