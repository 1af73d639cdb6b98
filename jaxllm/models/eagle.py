"""EAGLE's checkpoints, as their authors, vLLM and speculators write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.draft_head import DraftHead, Kind
from jaxllm.models.names import WeightNames
from jaxllm.models.registry import model_config

#: what the layers of a head may be; all have Llama's
_LAYERS = ("LlamaForCausalLM", "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "EagleLlamaForCausalLM")
_LAYERS += ("LlamaForCausalLMEagle", "EagleLlamaModel", "EAGLEModel", "Eagle3DraftModel", "Eagle3Speculator")


def draft_method(hf: Mapping[str, Any], guess: str) -> str:
    """How the checkpoint with this config.json drafts, where nobody says so: "eagle", "eagle3" or "draft_model".

    Args:
        guess: what its name sounds like, which decides where the config is one of Llama's with one layer.
    """
    hf = _flat(hf)
    names = hf.get("architectures") or [""]
    if "eagle3" in names[0].lower():
        return "eagle3"
    if "eagle" in names[0].lower():
        return guess if guess != "draft_model" else "eagle"
    # heads of several layers say what they are
    return guess if hf.get("num_hidden_layers", 1) == 1 else "draft_model"


def eagle_head(
    kind: Kind,
    hf: Mapping[str, Any],
    target: DecoderConfig,
    has: Callable[[str], bool],
    max_model_len: int | None,
) -> tuple[DraftHead, DecoderConfig]:
    """A head that drafts for `target`, and its layers.

    Args:
        kind: "eagle" or "eagle3".
        hf: its config.json.
        has: whether its weights have a tensor of this name.
        max_model_len: see `registry.model_config`.

    Raises:
        ValidationError: it is no such head, or does not fit the model.
    """
    hf = _flat(hf)
    names = hf.get("architectures") or ["LlamaForCausalLM"]
    if names[0] not in _LAYERS:
        raise ValidationError(f"its architecture {names[0]!r} is none of EAGLE's with Llama's layers: {_LAYERS}.")
    fields: dict[str, Any] = {**hf, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    fields.setdefault("max_position_embeddings", target.max_position_embeddings)
    layers = model_config({**fields, "vocab_size": target.vocab_size}, max_model_len)
    # one layer of EAGLE-3's has a name of its own
    layer = "midlayer." if kind == "eagle3" and layers.num_layers == 1 else "layers.{layer}."
    own_head = has("lm_head.weight")
    shared = {} if own_head else {"logits_scale": target.logits_scale, "logits_softcap": target.logits_softcap}
    own_embedding = has("embed_tokens.weight")
    scale = 1.0 if own_embedding else target.embedding_scale
    names = WeightNames(prefix="", layer=layer)
    layers = dataclasses.replace(layers, names=names, embedding_scale=scale, **shared)
    own_size = hf.get("target_hidden_size") or layers.hidden_size
    if not own_embedding and target.hidden_size != layers.hidden_size:
        raise ValidationError(
            f"its hidden_size is {layers.hidden_size} and it has no embed_tokens, and the model's is "
            f"{target.hidden_size}. Take a head that was trained for this model."
        )
    if kind == "eagle":
        if target.hidden_size != layers.hidden_size:
            raise ValidationError(
                f"its hidden_size is {layers.hidden_size}, and the model's is {target.hidden_size}. Take a head that "
                "was trained for this model."
            )
        bias = has("fc.bias") if hf.get("bias") is None else bool(hf["bias"])
        head = DraftHead(kind=kind, hidden_size=own_size, bias=bias, own_embedding=own_embedding, own_head=own_head)
        return head, layers
    tokens = hf.get("draft_vocab_size")
    head = DraftHead(
        kind=kind,
        hidden_size=target.hidden_size,
        keeps=_kept_layers(hf, target.num_layers),
        norm_before_residual=bool(hf.get("norm_before_residual")),
        own_embedding=own_embedding,
        own_head=own_head,
        num_tokens=tokens if tokens and tokens != target.vocab_size else None,
    )
    return head, layers


def _flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Speculators has the layers' fields in one of their own."""
    inner = hf.get("transformer_layer_config")
    return dict(hf) if inner is None else {**inner, **hf, "model_type": "llama"}


def _kept_layers(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers of the model whose inputs are taken; EAGLE-3's own choice where the config has none."""
    name = "eagle_aux_hidden_state_layer_ids"
    said = hf.get(name) or (hf.get("eagle_config") or {}).get(name)
    kept = tuple(said or (2, layers // 2, layers - 3))
    if any(not 0 <= layer < layers for layer in kept):
        raise ValidationError(
            f"it takes the inputs of the model's layers {', '.join(map(str, kept))}, and the model has {layers}. Take "
            f"a head that was trained for this model, or set {name} in its config.json."
        )
    return kept
