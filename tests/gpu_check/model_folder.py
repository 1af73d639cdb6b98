"""Folders with a config.json, and with random weights of it where they must be the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.registry import model_config
from jaxllm.models.sources import Source, decoder_sources

#: tensors whose scores should lie far apart, so that attention looks at something and rounding decides nothing
_GAINS = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 4.0}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """`folder`, which exists, as a model for load_format="dummy"."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """`folder`, which exists, as a float32 checkpoint: the same numbers on every machine."""
    write_config(folder, config)
    model = model_config(config)
    assert isinstance(model, DecoderConfig)
    draw = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    sources = jax.tree.leaves(decoder_sources(model), is_leaf=lambda x: isinstance(x, Source))
    for source in sources:
        for layer in range(source.layers) if source.layers is not None else (0,):
            for part in source.parts:
                name = part.name.format(layer=layer)
                tensors[name] = _tensor(draw, name, part.rows, source)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _tensor(draw: np.random.Generator, name: str, rows: int, source: Source) -> np.ndarray:
    if source.columns is None:
        return np.full(rows, 1.0 - (source.norm_offset or 0.0), np.float32)
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    drawn = draw.standard_normal((rows, source.columns), dtype=np.float32)
    return drawn * np.float32(gain / np.sqrt(source.columns))
