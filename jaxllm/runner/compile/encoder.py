"""The programs that encode pictures, in buckets of patches, and what a launch of one brings.

An item is encoded by itself, so that its vectors do not depend on what else there is; they go to rows of the cache of
encoded items, which is donated, and stay on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.layers.context import Context
from jaxllm.layers.vision import Patches
from jaxllm.models.clip_vision import ClipConfig, ClipParams
from jaxllm.models.qwen_vision import QwenVisionConfig
from jaxllm.models.vision import VisionConfig, VisionParams, encode
from jaxllm.multimodal.items import EncoderInput, Grid
from jaxllm.runner.packing import Packing

ENCODE = "encode"
#: mean and deviation of each channel, where bytes are numbers from 0 to 1
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
#: patches of the smallest bucket; each is twice as large as the one before
SMALLEST = 64


def encoder_buckets(config: VisionConfig, max_patches: int, *, eager: bool = False) -> tuple[int, ...]:
    """Patches of each program, ascending; the last one holds the largest item. Each has whole vectors.

    Args:
        eager: only every other one.
    """
    if isinstance(config, ClipConfig):
        squares = (number for number in config.squares if number * config.fixed_patches < max_patches)
        return (*(number * config.fixed_patches for number in squares if not eager), max_patches)
    merge_unit = config.merge_unit
    smallest = -(-SMALLEST // merge_unit) * merge_unit
    sizes, size = [], smallest
    while size < max_patches:
        sizes.append(size)
        size *= 4 if eager else 2
    return (*sizes, max(-(-max_patches // smallest) * smallest, smallest))


def encoder_packing(config: VisionConfig, num_patches: int) -> Packing:
    """What the program of a bucket reads besides pixels; `rows` 0 is where padding goes."""
    each, places = (num_patches,), (config.num_vectors(num_patches),)
    fields: dict[str, tuple[int, ...]] = {"positions": (num_patches, 2), "frames": each, "windows": each}
    if not (isinstance(config, ClipConfig) and config.has_newline):
        return Packing({**fields, "rows": places})
    # besides, no more rows end than there are in the squares; which vector each place has
    places = (places[0] + num_patches // config.side,)
    return Packing({**fields, "rows": places, "order": places})


def encode_step(
    context: Context,
    config: VisionConfig,
    normal: Normalization,
    packing: Packing,
    params: VisionParams,
    cache: jax.Array,
    pixels: jax.Array,
    words: jax.Array,
) -> jax.Array:
    """The cache of encoded items [rows, d], donated, with the vectors of an item.

    Args:
        context, config, normal, packing: static.
        pixels: uint8 [N, numbers of a patch].
        words: i32, the fields of `encoder_packing`.
    """
    fields = packing.unpack(words)
    patches = Patches(positions=fields["positions"], frames=fields["frames"], windows=fields["windows"])
    vectors = encode(context, config, params, normalized(config, normal, pixels, params.patch_embedding.dtype), patches)
    if isinstance(params, ClipParams) and params.newline is not None:
        vectors = jnp.concatenate([vectors, params.newline[None]])[fields["order"]]
    return cache.at[fields["rows"]].set(vectors.astype(cache.dtype))


def normalized(config: VisionConfig, normal: Normalization, pixels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What the tower takes of bytes [N, numbers of a patch], computed in float32."""
    mean, deviation = (jnp.asarray(numbers, jnp.float32)[:, None] for numbers in normal)
    channels = pixels.reshape(len(pixels), config.channels, -1).astype(jnp.float32) / 255
    return ((channels - mean) / deviation).astype(dtype).reshape(pixels.shape)


class EncoderPrograms:
    """How they are lowered, and what they are launched with.

    Args:
        config: of the tower.
        normal: what it takes of bytes.
        buckets: patches of each program.
        params, cache: trees of `jax.ShapeDtypeStruct` with shardings.
        rows, words, lower: `Programs._rows`, `Programs._words` and `Programs._lowered`.
    """

    def __init__(
        self,
        context: Context,
        config: VisionConfig,
        normal: Normalization,
        buckets: tuple[int, ...],
        params: VisionParams,
        cache: jax.ShapeDtypeStruct,
        rows: Callable[..., jax.ShapeDtypeStruct],
        words: Callable[[int], jax.ShapeDtypeStruct],
        lower: Callable[..., Any],
    ):
        self._context, self._config, self._params, self._cache = context, config, params, cache
        self._normal = normal
        self._rows, self._words, self._lower = rows, words, lower
        self.packings = {size: encoder_packing(config, size) for size in buckets}
        self.keys = tuple((ENCODE, size) for size in buckets)

    def lowerings(self) -> Mapping[str, Callable[[int], jax.stages.Lowered]]:
        """What lowers the program of a bucket."""
        return {ENCODE: self._lower_encode}

    def _lower_encode(self, size: int) -> jax.stages.Lowered:
        packing = self.packings[size]
        function = functools.partial(encode_step, self._context, self._config, self._normal, packing)
        pixels = self._rows(np.uint8, size, self._config.patch_numbers)
        args = self._params, self._cache, pixels, self._words(packing.size)
        return self._lower(function, *args, donate=1, out=getattr(self._cache.sharding, "spec", jax.P()))

    def bucket(self, num_patches: int) -> int:
        """The one that an item of so many patches is encoded in."""
        return next(size for size in self.packings if size >= num_patches)

    def pack(self, given: EncoderInput) -> tuple[int, np.ndarray, np.ndarray]:
        """(bucket, pixels, words) of an item."""
        size = self.bucket(given.item.grid.num_patches)
        return size, *pack_item(self._config, self.packings[size], size, given)

    def nothing(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, words) of padding alone."""
        return np.zeros((size, self._config.patch_numbers), np.uint8), np.zeros(self.packings[size].size, np.int32)


def pack_item(config: VisionConfig, packing: Packing, size: int, given: EncoderInput) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, words) of an item in a bucket of `size` patches, as `encode_step` takes them."""
    grid, unit = given.item.grid, config.merge_unit
    order, windows = window_order(grid, config)
    patches = (order[:, None] * unit + np.arange(unit)).reshape(-1)
    # never reused: the device may read them in place
    pixels = np.zeros((size, config.patch_numbers), np.uint8)
    pixels[: len(patches)] = given.item.pixels[patches]
    words = np.zeros(packing.size, np.int32)
    fields = packing.views(words)
    fields["positions"][: len(patches)] = patch_places(grid, config.merge_size)[patches]
    fields["windows"][: len(patches)] = np.repeat(windows, unit)
    for name in ("frames", "windows"):
        fields[name][len(patches) :] = -1
    # what follows no patch of its own comes in the order of the rows
    fields["rows"][: len(given.rows)] = given.rows[order] if config.has_windows else given.rows
    if given.item.order is not None:
        fields["order"][: len(given.rows)] = given.item.order
    return pixels, words


def patch_places(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column, i32 [N, 2], of each patch, in the order in which they are merged."""
    shape = grid.rows // merge_size, merge_size, grid.columns // merge_size, merge_size
    row, inner_row, column, inner_column = np.indices(shape, dtype=np.int32).transpose(0, 1, 3, 2, 4)
    places = np.stack([row * merge_size + inner_row, column * merge_size + inner_column], axis=-1)
    return places.reshape(-1, 2)


def window_order(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """The merged patches of an item window after window, and the window of each in this order: int [N / merge_unit]
    each. Windows at the edges are smaller; without windows the order stays.
    """
    rows, columns = grid.rows // config.merge_size, grid.columns // config.merge_size
    count = rows * columns
    if not (isinstance(config, QwenVisionConfig) and config.has_windows):
        return np.arange(count), np.zeros(count, np.int32)
    side = config.window_side
    row, column = np.indices((rows, columns), dtype=np.int32).reshape(2, -1)
    window = row // side * -(-columns // side) + column // side
    order = np.argsort(window, kind="stable")
    return order, window[order]
