"""A model's layers one at a time: read, run over some sequences, and let go.

What runs is the model's own forward pass, of a model that has this layer alone, over whole sequences. So one layer's
weights are in memory, and what comes out of it for all sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.cache import kv_cache_groups
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.dense_attention import WholeSequences
from jaxllm.layers.observed import Observed
from jaxllm.layers.weight import is_spec
from jaxllm.models import decoder
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.matrices import FIELDS
from jaxllm.models.params import Layers, Params
from jaxllm.models.segments import resegment
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.stages import Stage, stage_model
from jaxllm.quantizing.compiled import compiled
from jaxllm.quantizing.inputs import InputMoments, moments
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats import hugging_face
from jaxllm.weights.loader import as_stored, read_array

#: tokens that are scored at once: a vocabulary is large
SCORED = 256


class ModelLayers:
    """A checkpoint in 16 or 32 bits.

    Args:
        dtype: what is not quantized is rounded to it.

    Raises:
        WeightsError: the checkpoint does not fit its config.
    """

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, dtype: str):
        self.config, self.dtype, self._checkpoint = config, jnp.dtype(dtype), checkpoint
        specs = decoder_specs(config)
        #: under the names that are written, a segment a layer
        self.specs: Params = resegment(specs, (1,) * config.num_layers)
        checkpoint.check(specs, prefix=config.names.prefix)
        self._device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(self, layer: int) -> Layers:
        """A layer's weights, each [1, ...] in float32; vectors as they will be written."""
        read = self._read(self.specs.layers[layer])
        return jax.tree.map_with_path(lambda path, a: a if is_matrix(path) else self._rounded(a), read)

    def read_ends(self) -> Params:
        """What is outside of layers, in the dtype that is written."""
        return self._read(dataclasses.replace(self.specs, layers=()), self.dtype)

    def end_tensors(self, ends: Params) -> Iterator[hugging_face.Tensor]:
        """The tensors that are written of what is outside of layers."""
        return hugging_face.tensors(dataclasses.replace(self.specs, layers=()), ends)

    def head(self, ends: Params) -> Params:
        """What `score` takes, in float32."""
        # where the model has no head of its own, its embedding is one
        head = ends.embedding if ends.head is None else ends.head
        own: Any = dataclasses.replace(ends, embedding=None, position_embedding=None, head=head)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda array: jnp.asarray(np.asarray(array).astype(np.float32)), own)

    def _read(self, specs: Any, dtype: Any = jnp.float32) -> Any:
        with self._checkpoint.tensors(prefix=self.config.names.prefix) as reader:
            return jax.tree.map(
                lambda spec: read_array(reader, spec, self._device, dtype), as_stored(reader, specs), is_leaf=is_spec
            )

    def _rounded(self, array: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(array).astype(self.dtype).astype(np.float32))

    def begin(self, ends: Params, sequences: Sequence[Any]) -> list[jax.Array]:
        """What the first layer takes of each sequence of tokens: float32 [tokens, d]."""
        positions = None if ends.position_embedding is None else ends.position_embedding.astype(jnp.float32)
        table = Params(
            embedding=ends.embedding,
            position_embedding=positions,
            layers=(),
            norm=None,
            norm_bias=None,
            head=None,
        )
        return [_embedded(self.config, table, jnp.asarray(tokens, jnp.int32)) for tokens in sequences]

    def run(self, layer: int, weights: Layers, hidden: Sequence[jax.Array]) -> list[jax.Array]:
        """What comes out of a layer for each sequence."""
        config = self._alone(layer)
        return [_through(config, weights, x) for x in hidden]

    def observe(self, layer: int, weights: Layers, hidden: Sequence[jax.Array]) -> dict[str, InputMoments]:
        """The moments of the inputs that a layer's matrices get from all sequences together, by `leaf_name`."""
        config, found = self._alone(layer), None
        for x in hidden:
            own = _inputs(config, weights, x)
            found = own if found is None else _sum(found, own)
        return found or {}

    def score(self, ends: Params, hidden: jax.Array, tokens: Any) -> jax.Array:
        """The log-probability of every token of a sequence but the first: float32 [tokens - 1].

        Args:
            ends: from `head`.
            hidden: [tokens, d], what comes out of the last layer.
        """
        following = jnp.asarray(tokens, jnp.int32)[1:]
        pieces = [
            _scored(self.config, ends, hidden[first : first + SCORED], following[first : first + SCORED])
            for first in range(0, len(following), SCORED)
        ]
        return jnp.concatenate(pieces)

    def _alone(self, layer: int) -> DecoderConfig:
        return stage_model(self.config, Stage(index=1, count=3, first=layer, stop=layer + 1))


def leaf_name(path: tuple[Any, ...]) -> str:
    """Of an array of a layer: ``qkv``, ``sparse.experts.down``."""
    return ".".join(str(key.name) for key in path)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether an array of a layer is a matrix that is quantized. The projection of latents to keys and values is none:
    it is not multiplied by as it lies.
    """
    name = leaf_name(path)
    return name.rpartition(".")[2] in FIELDS and name != "latents.up"


@functools.partial(compiled, static_argnums=0)
def _embedded(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    # the rows of these tokens alone are widened
    wide = dataclasses.replace(params, embedding=params.embedding[tokens].astype(jnp.float32))
    own = jnp.arange(len(tokens), dtype=jnp.int32)
    batch = StepBatch(tokens=own, attention=WholeSequences(sequences=1, length=len(tokens)))
    return decoder.embedded(Context(), config, wide, batch)


@functools.partial(compiled, static_argnums=0)
def _through(config: DecoderConfig, weights: Layers, hidden: jax.Array) -> jax.Array:
    return _forward(config, weights, hidden)


@functools.partial(compiled, static_argnums=0)
def _inputs(config: DecoderConfig, weights: Layers, hidden: jax.Array) -> dict[str, InputMoments]:
    found: dict[str, InputMoments] = {}

    def watched(path: tuple[Any, ...], array: jax.Array) -> Any:
        name = leaf_name(path)
        if not is_matrix(path) or ".experts." in name:
            return array
        return Observed(array, lambda x: found.__setitem__(name, moments(x)))

    # what a matrix sees belongs to the trace in which it is multiplied, which has to be this one
    with jax.disable_jit():
        _forward(config, jax.tree.map_with_path(watched, weights), hidden)
    return found


@compiled
def _sum(found: dict[str, InputMoments], more: dict[str, InputMoments]) -> dict[str, InputMoments]:
    return jax.tree.map(jnp.add, found, more)


def _forward(config: DecoderConfig, weights: Any, hidden: jax.Array) -> jax.Array:
    tokens = hidden.shape[0]
    spec = config.kv_specs[0]
    cache = jnp.zeros((spec.parts, tokens, spec.heads, spec.width), hidden.dtype)
    batch = StepBatch(
        tokens=jnp.zeros(tokens, jnp.int32),
        attention=WholeSequences(sequences=1, length=tokens),
        hidden=hidden,
    )
    params: Any = Params(embedding=None, layers=(weights,), norm=None, norm_bias=None, head=None)  # pyright: ignore
    return decoder.forward(Context(), config, kv_cache_groups(config.kv_specs), params, cache, batch)[1]


@functools.partial(compiled, static_argnums=0)
def _scored(config: DecoderConfig, ends: Params, hidden: jax.Array, following: jax.Array) -> jax.Array:
    normed = decoder.last_norm(config, ends, hidden[: len(following)])
    scores = jax.nn.log_softmax(decoder.logits(Context(), config, ends, normed), axis=-1)
    return jnp.take_along_axis(scores, following[:, None], axis=1)[:, 0]
