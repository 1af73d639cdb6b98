"""How well a model's weights foresee a text by themselves: no engine runs, but the model's function of whole sequences,
with each matrix as what it stands for. All forms of the weights share one compiled program, but for those that round
their inputs, too. So many forms are compared in little time; an engine's own rounding is not among what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.engine_args import engine_args
from jaxllm.models import whole_sequences
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.matrices import quantized
from jaxllm.models.model import base_prefix
from jaxllm.models.params import Params
from jaxllm.models.specs import decoder_specs
from jaxllm.startup.setup import read_setup
from jaxllm.weights.resolve import resolve
from pallas_kernels.quantized import RoundedInputs, dense, is_quantized


class WeightsAlone:
    """The weights of a model, as an engine with these arguments would store them.

    Args:
        model: a named model, a directory, a .gguf file, or a hub id.
        dtype: of what is computed.
        arguments: as `LLM` takes them, those that say what weights are read, and how.
    """

    def __init__(self, model: str, *, dtype: str, **arguments: Any):
        args = engine_args(model, dtype=dtype, **arguments)
        path = resolve(model, revision=args.revision, token=args.hf_token, load_format=args.load_format)
        setup = read_setup(args, path)
        assert isinstance(setup.model, DecoderConfig)
        self._model: DecoderConfig = setup.model
        checkpoint = setup.checkpoint
        specs: Any = decoder_specs(self._model)
        if checkpoint.quantization is not None:
            specs = quantized(specs, checkpoint.quantization.layout)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        own = jnp.dtype(dtype)
        params: Any = checkpoint.load(specs, own, here, prefix=base_prefix(self._model), seed=0, progress=False)
        #: of all arrays, as they are stored
        self.weight_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        if not any(isinstance(leaf, RoundedInputs) for leaf in leaves):
            params = jax.tree.map(lambda weight: dense(weight, own), params, is_leaf=is_quantized)
        self._params: Params = params

    def scores(self, windows: list[list[int]], length: int) -> Iterator[tuple[float, int]]:
        """Of each window of at most `length` tokens the sum of its tokens' log-probabilities, and how many these are:
        all but the first.
        """
        for window in windows:
            tokens = jnp.asarray(np.pad(window, (0, length - len(window))), jnp.int32)
            yield float(_summed(self._model, self._params, tokens, len(window))), len(window) - 1


def _sum(model: DecoderConfig, params: Params, tokens: jax.Array, length: jax.Array) -> jax.Array:
    found = whole_sequences.token_logprobs(model, params, tokens[None])[0]
    return jnp.sum(jnp.where(jnp.arange(len(found)) < length - 1, found, 0))


_summed = jax.jit(_sum, static_argnums=0)
