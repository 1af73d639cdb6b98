"""GPT-J: LayerNorm, attention and MLP beside each other behind one norm, neighbours paired in the part of each head
that turns, biases of the MLP and of the scores (Wang and Komatsuzaki 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.gpt2 import common_sizes
from jaxllm.models.llama import common_fields, rope, rope_scaling
from jaxllm.models.names import WeightNames

NAMES = WeightNames(
    prefix="transformer.",
    layer="h.{layer}.",
    embedding="wte",
    norm="ln_f",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    output="attn.out_proj",
    gate_up=("mlp.fc_in",),
    down="mlp.fc_out",
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    sizes = common_sizes(hf)
    fields = common_fields({**hf, **sizes, "attention_bias": False, "mlp_bias": True})
    turned = hf.get("rotary_dim", 64)
    if not isinstance(turned, int) or turned % 2 or not 0 < turned <= fields["head_dim"]:
        raise ValidationError(
            f"rotary_dim={turned} is not supported: it must be even, and at most head_dim={fields['head_dim']}."
        )
    return DecoderConfig(
        **{
            **fields,
            "rope": (rope({**hf, **sizes}, turned, 10000.0, rope_scaling(hf)),),
            "rope_interleaved": True,
            "norm": "layer",
            "norm_bias": True,
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "parallel": True,
            "shared_norm": True,
            "gated_mlp": False,
            "head_bias": True,
            "names": NAMES,
        }
    )
