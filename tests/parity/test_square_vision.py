"""Towers of square pictures give the vectors that transformers gives, of pictures that are prepared as it does."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.pictures import encoded, reader_of
from support.seeing_models import SQUARE, picture, write_seeing_model

from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.media import media_limits
from jaxllm.layers.context import Context
from jaxllm.models.llava_next import tile_grids
from jaxllm.models.registry import model_config
from jaxllm.models.vision import vision_specs
from jaxllm.multimodal.items import EncoderInput
from jaxllm.multimodal.square_processor import SquareProcessor
from jaxllm.multimodal.tile_processor import TileProcessor
from jaxllm.runner.compile.encoder import encode_step, encoder_buckets, encoder_packing, pack_item
from jaxllm.startup.media_setup import read_media
from jaxllm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SIZES = ((100, 70), (33, 300), (20, 20), (7, 5))


@pytest.mark.parametrize("family", SQUARE)
def test_vectors_are_transformers(family: str, tmp_path: Path):
    """Of odd sizes; of more patches than a block of scores has queries."""
    checkpoint = Checkpoint(write_seeing_model(tmp_path, family))
    model = model_config(checkpoint.config)
    config, setup = model.vision, read_media(EngineArgs(model=str(tmp_path)), checkpoint, model)
    assert config is not None and setup is not None
    own = setup.any_processor
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params: Any = checkpoint.load(vision_specs(config), jnp.dtype("float32"), sharding, seed=0, progress=False)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    size = encoder_buckets(config, own.patches_of(own.most_tokens))[-1]
    packing = encoder_packing(config, size)
    encoded = jax.jit(functools.partial(encode_step, Context(), config, own.normal, packing))
    features = {} if family == "gemma3" else {
        name: getattr(theirs.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")
    }  # fmt: skip
    for width, height in SIZES:
        given = picture(width, height)
        (item,) = own.image(given).items
        rows = np.arange(1, item.num_tokens + 1, dtype=np.int32)
        cache = jnp.zeros((1 + own.most_tokens, 64))
        cache = encoded(params, cache, *pack_item(config, packing, size, EncoderInput(item, rows)))
        vectors = cache[1 : 1 + item.num_tokens]
        with torch.no_grad():
            prepared = processor([given], return_tensors="pt")
            sizes = {"image_sizes": prepared["image_sizes"]} if family == "llava-next" else {}
            found = theirs.model.get_image_features(prepared["pixel_values"], **sizes, **features)
            expected = found.pooler_output[0]
        assert vectors.shape == expected.shape == (item.num_tokens, 64)
        np.testing.assert_allclose(np.asarray(vectors), expected.numpy(), atol=1e-4)


SHAPE: dict[str, Any] = {"image_size": 20, "patch_size": 5, "merge_size": 1, "num_tokens": 16}


@pytest.mark.parametrize(
    "fields",
    [
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 27}},
        {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 20}, "do_pad": True},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 20}, "resample": 2},
        {"image_processor_type": "CLIPImageProcessor", "size": {"height": 20, "width": 20}, "do_center_crop": False},
    ],
    ids=str,
)
def test_bytes_are_transformers(fields: dict[str, Any]):
    if "Siglip" not in fields["image_processor_type"]:
        fields = {**fields, "crop_size": {"height": 20, "width": 20}}
    kind = getattr(transformers, f"{fields['image_processor_type']}Pil")
    theirs = kind(**{name: value for name, value in fields.items() if name != "image_processor_type"})
    ours = SquareProcessor.of(fields, "", **SHAPE)
    mean, deviation = (np.asarray(numbers)[:, None] for numbers in ours.normal)
    for size in SIZES:
        given = picture(*size)
        pixels = ours.image(given).items[0].pixels.reshape(4, 4, 3, 5, 5).transpose(2, 0, 3, 1, 4).reshape(3, -1)
        expected = np.asarray(theirs([given], return_tensors="np")["pixel_values"][0]).reshape(3, -1)
        np.testing.assert_allclose((pixels / 255 - mean) / deviation, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' of preprocessor_config.json is not"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan=True of preprocessor_config.json is not supported; False is"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"size": {"height": 30, "width": 20}}, "differs from config.json's image_size=20"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 10}}, "at least 20"),
    ],
)
def test_what_is_done_otherwise_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        SquareProcessor.of(fields, "Gemma3ImageProcessor", **SHAPE)


def test_a_line_is_not_made_a_square():
    """Cutting out its middle would make it larger than any picture first."""
    processor = SquareProcessor.of({"crop_size": 20}, "CLIPImageProcessor", **SHAPE)
    with pytest.raises(ValidationError, match="are too narrow"):
        processor.image(picture(400_000, 1))
    padded = SquareProcessor.of({"crop_size": 20, "do_pad": True}, "LlavaImageProcessor", **SHAPE)
    with pytest.raises(ValidationError, match="the square that they are put on would have more than"):
        padded.image(picture(12_000, 1))


GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def tiles(largest: tuple[int, int] | None = None) -> TileProcessor:
    own = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    return TileProcessor.of(SquareProcessor.of(own, "LlavaNextImageProcessor", **SHAPE), GRIDS, largest)


def test_tiles_have_as_many_vectors_as_transformers_counts():
    """Of pictures of any form: very wide and very high ones too."""
    theirs: Any = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    theirs.image_processor = SimpleNamespace(
        image_grid_pinpoints=[[20 * rows, 20 * columns] for rows, columns in GRIDS]
    )
    theirs.patch_size, theirs.num_additional_image_tokens = 5, 0
    ours, random = tiles(), np.random.default_rng(0)
    sizes = [*random.integers(1, 400, (200, 2)).tolist(), [1, 4000], [4000, 1], [1, 1], [1000, 997]]
    for width, height in sizes:
        expected = theirs._get_number_of_features(height, width, 20, 20)
        assert ours.tokens_of(width, height) == len(ours._order(width, height)) == expected
        assert expected <= ours.most_tokens


def test_more_tiles_than_were_planned_for_are_refused():
    small = tiles(largest=(40, 20))
    assert (small.most_tiles, small.patches_of(1)) == (2, 3 * 16)
    assert small.image(picture(80, 40)).num_tokens == 16 + 4 * 9 < small.most_tokens == 16 + 8 * 5
    with pytest.raises(ValidationError, match=r"of 40 x 40 pixels becomes 4 tiles, and the engine has planned for 2"):
        small.image(picture(40, 40))
    with pytest.raises(ValidationError, match="mm_processor_kwargs has 'max_pixels'"):
        small.with_options({"max_pixels": 1})
    with pytest.raises(ValidationError, match="which is not made of tiles of 20 x 20 pixels"):
        tile_grids({"image_grid_pinpoints": [[20, 30]]}, 20)


@pytest.mark.parametrize("largest", [(40, 20), (60, 30), (25, 50), (7, 5)])
def test_tiles_are_those_of_any_smaller_picture(largest: tuple[int, int]):
    """A square one may become more of them than the wide one that was said."""
    sizes = ((width, height) for width in range(1, largest[0] + 1) for height in range(1, largest[1] + 1))
    most = max(math.prod(tiles()._grid(*size)) for size in sizes)
    assert tiles(largest).most_tiles == most == (2 if min(largest) <= 20 else 4)


def test_pictures_are_turned_before_they_are_cut():
    """A head has the sides of a picture that is not turned yet, of which there may be more tiles."""
    own = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    square = SquareProcessor.of(own, "LlavaNextImageProcessor", **SHAPE)
    reader = reader_of({"image": TileProcessor.of(square, ((1, 4), (2, 1)), (20, 80))}, max_tokens=200)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(80, 20), "JPEG", exif=exif)
    (media,) = reader.read({"multi_modal_data": {"image": turned}})
    assert media.items[0].grid.num_patches == 3 * 16
    with pytest.raises(ValidationError, match="image of 80 x 20 pixels becomes 4 tiles, and the engine has planned"):
        reader.read({"multi_modal_data": {"image": encoded(picture(80, 20), "JPEG")}})


def test_forms_that_are_null_are_transformers():
    assert tile_grids({"image_grid_pinpoints": None}, 336) == tile_grids({}, 336) == GRIDS


def test_smaller_pictures_than_were_planned_for_have_room(tmp_path: Path):
    """Those of another form may fill their tiles, and so have more vectors than one of the size that was said."""
    checkpoint = Checkpoint(write_seeing_model(tmp_path, "llava-next"))
    limits = media_limits("", {"image": {"count": 1, "width": 44, "height": 15}})
    args = EngineArgs(model=str(tmp_path), limit_mm_per_prompt=limits)
    setup = read_media(args, checkpoint, model_config(checkpoint.config))
    assert setup is not None
    sizes = []
    for given in (picture(44, 15), picture(30, 15)):
        (media,) = setup.reader(200, None).read({"multi_modal_data": {"image": given}})
        sizes.append(media.num_tokens)
    assert sizes == [16 + 2 * 9, 16 + 4 * 9] and setup.most_tokens(200) == 16 + 8 * 5
