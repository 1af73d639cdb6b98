"""Layers for predicting the token after the next one that lie in a model's own checkpoint: behind the last layer, as
DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2) and GLM-4.5 have theirs, or in a part of its own, as
Qwen3-Next has it. That one hands on what is behind its last norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.draft_head import DraftHead

#: whose layers lie behind the last one
_BEHIND = ("DeepseekV3ForCausalLM", "DeepSeekMTPModel", "Glm4MoeForCausalLM")
#: whose layers lie in a part of their own, and are as the model's. Qwen3-Next itself has others, which are not built
_APART = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


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
    if name not in (*_BEHIND, *_APART):
        raise ValidationError(
            f"speculative_config.method='mtp' is for {', '.join((*_BEHIND, *_APART))} with a layer that drafts, and "
            f"this is {name}. {remedy}"
        )
    apart = name in _APART
    # Qwen3-Next's config does not say how many there are
    number = hf.get("num_nextn_predict_layers") or int(apart)
    if number != 1:
        raise ValidationError(
            f"speculative_config.method='mtp': num_nextn_predict_layers of config.json is {number}, and one layer is "
            f"what can draft. {remedy}"
        )
    module, matrix = ("mtp.", "fc") if apart else (f"layers.{target.num_layers}.", "eh_proj")
    prefix = module if apart else f"{target.names.prefix}{module}"
    if not has(f"{prefix}{matrix}.weight"):
        raise ValidationError(
            f"speculative_config.method='mtp': there is no tensor {prefix}{matrix}.weight: the layer that drafts "
            f"was left out of the checkpoint. {remedy}"
        )
    if apart:
        names = dataclasses.replace(target.names, prefix=module)
        head = DraftHead(
            kind="mtp",
            hidden_size=target.hidden_size,
            prefix=prefix,
            matrix=matrix,
            norms=("pre_fc_norm_embedding", "pre_fc_norm_hidden"),
            hands_on_normed=True,
        )
    else:
        names = dataclasses.replace(
            target.names,
            layer=module,
            embedding=f"{module}embed_tokens",
            norm=f"{module}shared_head.norm",
            head=f"{prefix}shared_head.head",
        )
        head = DraftHead(
            kind="mtp",
            hidden_size=target.hidden_size,
            own_embedding=has(f"{prefix}embed_tokens.weight"),
            own_head=has(f"{prefix}shared_head.head.weight"),
            prefix=prefix,
            matrix=matrix,
        )
    model = dataclasses.replace(
        target,
        num_layers=1,
        layer_rope=target.layer_rope[-1:],
        layer_window=target.layer_window[-1:],
        layer_moe=target.layer_moe[-1:],
        tie_word_embeddings=False,
        names=names,
    )
    return head, model
