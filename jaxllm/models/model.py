"""What every family of models offers: a configuration, a forward pass, and where its weights come from."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models import bert, decoder
from jaxllm.models.bert import BertConfig, BertParams
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.specs import bert_specs, decoder_specs

ModelConfig = DecoderConfig | BertConfig
ModelParams = Params | BertParams


def forward(
    context: Context,
    config: ModelConfig,
    groups: tuple[KVCacheGroup, ...],
    params: ModelParams,
    cache: Cache,
    batch: StepBatch,
) -> tuple[Cache, jax.Array]:
    """One step through all layers: `decoder.forward`, or what the family has in its place."""
    if isinstance(config, BertConfig):
        assert isinstance(params, BertParams)
        return bert.forward(context, config, groups, params, cache, batch)
    assert isinstance(params, Params)
    return decoder.forward(context, config, groups, params, cache, batch)


def body_specs(config: ModelConfig) -> ModelParams:
    """The tree of `WeightSpec`s of everything but a head over the vocabulary, the layers in one segment."""
    if isinstance(config, BertConfig):
        return bert_specs(config)
    return dataclasses.replace(decoder_specs(config), head=None)


def base_prefix(config: ModelConfig) -> str:
    """What the names of the body's tensors begin with; checkpoints of the bare model leave it out."""
    return config.prefix if isinstance(config, BertConfig) else config.names.prefix
