"""Folders with a config.json, and with random weights of it where they must be the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxllm.layers.weight import WeightSpec, is_spec
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs

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
    for spec in jax.tree.leaves(decoder_specs(model), is_leaf=is_spec):
        for name, part in spec.tensors():
            tensors[name] = _tensor(draw, name, part.shape, spec)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _tensor(draw: np.random.Generator, name: str, shape: tuple[int, ...], spec: WeightSpec) -> np.ndarray:
    if len(shape) == 1:
        return np.full(shape, 1.0 if spec.init is None else spec.init, np.float32)
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    drawn = draw.standard_normal(shape, dtype=np.float32)
    return drawn * np.float32(gain / np.sqrt(shape[1]))
