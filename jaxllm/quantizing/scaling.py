"""Scales that move from the inputs of a matrix into its columns (AWQ), and out of what makes these inputs: the norm in
front of it, or the rows of another matrix. The layer computes what it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.layers.activation import CLAMPED
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Layers
from jaxllm.quantizing.awq import column_scales
from jaxllm.quantizing.grid import Grid
from jaxllm.quantizing.inputs import InputMoments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What makes the inputs of some matrices."""

    #: fields of `Layers`: a norm, or a matrix
    source: str
    matrices: tuple[str, ...]
    #: of a source that is a matrix: its first row that makes inputs; its last one makes the last of them
    first_row: int = 0
    #: numbers of neighbouring inputs that are one unit, and how often in turn each unit is there: a head of values is
    #: there for every head of queries that shares it
    width: int = 1
    times: int = 1


def links(config: DecoderConfig) -> list[Link]:
    """Where a layer of this model can be scaled."""
    c, found = config, []
    if c.pre_norms and c.latents is None:
        shared = c.shared_norm and c.moe is None
        if shared or not c.shared_norm:
            found.append(Link(source="attention_norm", matrices=("qkv", "gate_up") if shared else ("qkv",)))
    if c.pre_norms and not c.shared_norm and not any(c.layer_moe):
        found.append(Link(source="mlp_norm", matrices=("gate_up",)))
    if c.latents is None and c.qkv_clip is None:
        # values are the last rows
        first, times = (c.num_heads + c.num_kv_heads) * c.head_dim, c.num_heads // c.num_kv_heads
        found.append(Link(source="qkv", matrices=("output",), first_row=first, width=c.head_dim, times=times))
    if c.gated_mlp and c.activation != CLAMPED and not any(c.layer_moe):
        # the inputs are proportional to what is behind the gates
        found.append(Link(source="gate_up", matrices=("down",), first_row=c.intermediate_size))
    return found


@dataclasses.dataclass(frozen=True)
class Scales:
    """Of a layer's matrices: what their columns were multiplied by, and their rows divided by; absent: nothing."""

    columns: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]

    def scaled(self, name: str, matrix: np.ndarray) -> np.ndarray:
        """A matrix [N, K] as it is then."""
        if name in self.columns:
            matrix = matrix * self.columns[name]
        return matrix / self.rows[name][:, None] if name in self.rows else matrix

    def undone(self, name: str, matrix: np.ndarray) -> np.ndarray:
        """`scaled` backwards: what a matrix does for the inputs that it had."""
        if name in self.rows:
            matrix = matrix * self.rows[name][:, None]
        return matrix / self.columns[name] if name in self.columns else matrix


def scale_layer(
    config: DecoderConfig,
    grids: Mapping[str, Grid],
    weights: Layers,
    inputs: Mapping[str, InputMoments],
    dtype: jnp.dtype,
) -> tuple[Layers, Scales]:
    """Find the scales of one layer.

    Args:
        grids: of its matrices that are rounded, by their field of `Layers`.
        weights: each [1, ...], float32.
        dtype: norms are rounded to it, and what that leaves out of a scale is left out of the columns, too.

    Returns:
        (weights, scales): the weights with what makes inputs scaled down; matrices have their columns yet as they were.
    """
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    changed: dict[str, jax.Array] = {}

    def rounded(vector: np.ndarray) -> jax.Array:
        return jnp.asarray(vector.astype(dtype).astype(np.float32))[None]

    def vector_of(field: str) -> np.ndarray | None:
        array = getattr(weights, field)
        return None if array is None else np.asarray(array)[0]

    for link in links(config):
        names = [name for name in link.matrices if name in grids]
        is_norm = link.source.endswith("norm")
        if len(names) != len(link.matrices) or not (is_norm or link.source in grids):
            continue
        absolute = np.asarray(inputs[names[0]].absolute)
        if link.times > 1:
            units = absolute.reshape(-1, link.times, link.width).mean(axis=1, keepdims=True)
            absolute = np.repeat(units, link.times, axis=1).ravel()
        matrices = [getattr(weights, name)[0] for name in names]
        grams = [inputs[name].gram for name in names]
        found = np.asarray(column_scales(grids[names[0]], matrices, grams, jnp.asarray(absolute)))
        bias = vector_of(f"{link.source}_bias")
        if is_norm:
            norm, offset = vector_of(link.source), np.float32(config.norm_offset)
            assert norm is not None
            new = rounded((norm + offset) / found - offset)
            left = np.asarray(new)[0] + offset
            found = np.where(left == 0, found, (norm + offset) / np.where(left == 0, 1, left))
            changed[link.source] = new
            divided = found
        else:
            divided = np.ones(getattr(weights, link.source).shape[1], np.float32)
            divided[link.first_row :] = found.reshape(-1, link.times, link.width)[:, 0].ravel()
            rows[link.source] = divided
        if bias is not None:
            changed[f"{link.source}_bias"] = rounded(bias / divided)
        columns.update(dict.fromkeys(names, found))
    return dataclasses.replace(weights, **changed), Scales(columns, rows)
