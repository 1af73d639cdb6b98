"""Towers that see pictures give the vectors that transformers gives, whatever blocks attention is cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeing_models import picture, write_seeing_model

from jaxllm.layers import vision
from jaxllm.layers.context import Context
from jaxllm.layers.vision import Patches
from jaxllm.models.qwen_vision import QwenVisionConfig
from jaxllm.models.registry import model_config
from jaxllm.models.vision import encode, vision_specs
from jaxllm.multimodal.items import EncoderInput, Grid
from jaxllm.multimodal.qwen_processor import QwenProcessor
from jaxllm.runner.compile.encoder import encoder_packing, normalized, pack_item, window_order
from jaxllm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_vectors_are_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of odd sizes, in a bucket that they do not fill; attention in several blocks of each kind."""
    monkeypatch.setattr(vision, "TILE_SCORES", 2**13)
    monkeypatch.setattr(vision, "WINDOW_TILE", 32)
    folder = write_seeing_model(tmp_path, family)
    checkpoint = Checkpoint(folder)
    config = model_config(checkpoint.config).vision
    assert isinstance(config, QwenVisionConfig)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params = checkpoint.load(vision_specs(config), jnp.dtype("float32"), sharding, seed=0, progress=False)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = QwenProcessor.of(checkpoint.config["vision_config"], {})
    size, packing = 512, encoder_packing(config, 512)

    @jax.jit
    def encoded(pixels: jax.Array, words: jax.Array) -> Any:
        fields = packing.unpack(words)
        patches = Patches(positions=fields["positions"], frames=fields["frames"], windows=fields["windows"])
        normal = normalized(config, processor.normal, pixels, jnp.dtype("float32"))
        return encode(Context(), config, params, normal, patches), fields["rows"]

    for width, height in ((100, 70), (33, 300), (300, 290), (28, 112), (230, 140)):
        (item,) = processor.image(picture(width, height)).items
        rows = np.arange(1, item.num_tokens + 1, dtype=np.int32)
        pixels, words = pack_item(config, packing, size, EncoderInput(item, rows))
        vectors, places = encoded(pixels, words)
        ours = np.zeros((item.num_tokens + 1, config.output_size), np.float32)
        ours[np.asarray(places)] = np.asarray(vectors)
        with torch.no_grad():
            grid = torch.tensor([[1, *item.grid]])
            given = np.asarray(normalized(config, processor.normal, jnp.asarray(item.pixels), jnp.dtype("float32")))
            expected = theirs.model.visual(torch.tensor(given), grid_thw=grid).pooler_output
        np.testing.assert_allclose(ours[1:], expected.numpy(), atol=1e-4)


def test_windows_are_transformers():
    utils = pytest.importorskip("transformers.vision_utils")
    config = QwenVisionConfig(
        num_layers=2, hidden_size=8, intermediate_size=8, num_heads=1, output_size=8, activation="silu", gated=True,
        channels=3, patch_size=14, temporal_patch_size=2, merge_size=2, full_layers=(1,), window_size=112,
    )  # fmt: skip
    for grid in (Grid(2, 2), Grid(8, 8), Grid(10, 22), Grid(16, 6), Grid(34, 18)):
        order, windows = window_order(grid, config)
        expected, stops = utils.get_vision_window_index(torch.tensor([[1, *grid]]), 2, 112, 14)
        np.testing.assert_array_equal(order, expected.numpy())
        assert np.bincount(windows).tolist() == (np.diff(stops.numpy()) // 4).tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_older_and_newer_configs_are_the_same_model(family: str, tmp_path: Path):
    """Flat ones, as on the hub, and those that transformers 5 writes."""
    flat = write_seeing_model(tmp_path, family)
    config = transformers.AutoConfig.from_pretrained(flat)
    nested = {**config.to_dict(), "architectures": Checkpoint(flat).config["architectures"]}
    assert "hidden_size" not in nested and nested["text_config"]["hidden_size"] == 64
    assert model_config(nested) == model_config(Checkpoint(flat).config)
