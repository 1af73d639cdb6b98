"""A checkpoint's weights without an engine, and checkpoints with other tensors or another configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from jaxllm.models.matrices import matrices, quantized
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats.tensor_files import TensorFiles

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
#: matrices of a layer
FIELDS = ("qkv", "output", "gate_up", "down")
F32 = jnp.dtype(jnp.float32)


def specs_of(
    folder: Path, asked: str | None = None, load_format: str = "auto", prefix: str = "model."
) -> tuple[Checkpoint, Any]:
    """A checkpoint, and what its matrices are loaded as.

    Args:
        asked: the engine's ``quantization``.
        prefix: of the text model's tensors.
    """
    checkpoint = Checkpoint(folder, load_format)
    specs = decoder_specs(model_config(checkpoint.config))
    checkpoint.quantize(asked, matrices(specs), prefix=prefix)
    if checkpoint.quantization is not None:
        specs = quantized(specs, checkpoint.quantization.layout)
    return checkpoint, specs


def load(folder: Path, asked: str | None = None, load_format: str = "auto", prefix: str = "model.") -> Any:
    """In float32, as far as they are not quantized."""
    checkpoint, specs = specs_of(folder, asked, load_format, prefix)
    checkpoint.check(specs, prefix=prefix)
    return checkpoint.load(specs, F32, DEVICE, prefix=prefix, seed=0, progress=False)


def edited(folder: Path, **changes: Any) -> Path:
    """A checkpoint with other tensors; None: without one."""
    with TensorFiles(folder) as reader:
        tensors = {name: reader.raw(name).copy() for name in reader.names()}
    tensors.update({name: value for name, value in changes.items() if value is not None})
    save_file({n: v for n, v in tensors.items() if changes.get(n, v) is not None}, folder / "model.safetensors")
    return folder


def rewritten(folder: Path, **fields: Any) -> Path:
    """With other fields of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
