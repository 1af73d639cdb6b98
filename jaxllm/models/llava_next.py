"""LLaVA-NeXT (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge"): LLaVA, whose pictures are
seen once as a whole and once in tiles, as many as come closest to their form. Each row of the tiles' vectors ends in a
learned one; what only the ground behind a picture became is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.models import llava
from jaxllm.models.decoder_config import DecoderConfig

#: where config.json has none, or null, as transformers has them: height and width
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """
    Raises:
        KeyError, ValidationError: as `llava.config_from_hf`, or tiles that no tower sees.
    """
    model = llava.config_from_hf(hf)
    vision: Any = model.vision
    if vision.class_token != vision.drops_first:
        raise ValidationError(
            f"vision_feature_select_strategy={hf.get('vision_feature_select_strategy', 'default')!r} leaves no square "
            "of features, which are put together with those of other tiles. Of CLIP's tower 'default' does, of "
            "SigLIP's 'full'."
        )
    tiles = {rows * columns for rows, columns in tile_grids(hf, vision.image_size)}
    vision = dataclasses.replace(vision, squares=tuple(1 + number for number in sorted(tiles)), has_newline=True)
    return dataclasses.replace(model, vision=vision)


def tile_grids(hf: Mapping[str, Any], tile_size: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles that a picture may become, from config.json or preprocessor_config.json.

    Raises:
        ValidationError: there are none, or they are not made of whole tiles.
    """
    given, found = hf.get("image_grid_pinpoints"), []
    pinpoints = _PINPOINTS if given is None else given
    for each in pinpoints if isinstance(pinpoints, list | tuple) else [pinpoints]:
        sides = each if isinstance(each, list | tuple) and len(each) == 2 else (each, each)
        height, width = (checks.integer("image_grid_pinpoints", side) for side in sides)
        if min(height, width) < tile_size or height % tile_size or width % tile_size:
            raise ValidationError(
                f"image_grid_pinpoints has {each!r:.80}, which is not made of tiles of {tile_size} x {tile_size} pixels"
            )
        found.append((height // tile_size, width // tile_size))
    if not found:
        raise ValidationError("image_grid_pinpoints of config.json is empty: a picture needs one form at least")
    return tuple(found)
