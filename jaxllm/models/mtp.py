"""DeepSeek-V3's layer for predicting the token after the next one, which lies in its checkpoints behind the last layer
(DeepSeek-AI 2024, arXiv:2412.19437, section 2.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.draft_head import DraftHead

#: whose layers are known
_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepSeekMTPModel")


def mtp_head(
    hf: Mapping[str, Any], target: DecoderConfig, has: Callable[[str], bool]
) -> tuple[DraftHead, DecoderConfig]:
    """The layer of `target`'s own checkpoint that drafts for it, as a head and its layers.

    Args:
        hf: the model's config.json.
        has: whether its weights have a tensor of this name.

    Raises:
        ValidationError: there is none.
    """
    remedy = "Take method='ngram' or 'suffix', which need no weights."
    name = next(iter(hf.get("architectures") or ("the model",)))
    if name not in _ARCHITECTURES:
        raise ValidationError(
            f"speculative_config.method='mtp' is for {_ARCHITECTURES[0]}, whose checkpoints have a layer that drafts, "
            f"and this is {name}. {remedy}"
        )
    layers, number = hf.get("num_nextn_predict_layers") or 0, target.num_layers
    if layers != 1:
        raise ValidationError(
            f"speculative_config.method='mtp': num_nextn_predict_layers of config.json is {layers}, and one layer is "
            f"what can draft. {remedy}"
        )
    module = f"layers.{number}."
    prefix = f"{target.names.prefix}{module}"
    if not has(f"{prefix}eh_proj.weight"):
        raise ValidationError(
            f"speculative_config.method='mtp': there is no tensor {prefix}eh_proj.weight: the layer that drafts "
            f"was left out of the checkpoint. {remedy}"
        )
    own_embedding, own_head = (has(f"{prefix}{name}.weight") for name in ("embed_tokens", "shared_head.head"))
    model = dataclasses.replace(
        target,
        num_layers=1,
        layer_rope=target.layer_rope[-1:],
        layer_window=target.layer_window[-1:],
        layer_moe=target.layer_moe[-1:],
        tie_word_embeddings=False,
        names=dataclasses.replace(
            target.names,
            layer=module,
            embedding=f"{module}embed_tokens",
            norm=f"{module}shared_head.norm",
            head=f"{prefix}shared_head.head",
        ),
    )
    head = DraftHead(
        kind="mtp",
        hidden_size=target.hidden_size,
        own_embedding=own_embedding,
        own_head=own_head,
        prefix=prefix,
        matrix="eh_proj",
    )
    return head, model
