"""Quantized models, cut to two of their layers: shapes as their config.json has them."""

from __future__ import annotations

from typing import Any

from support.large_models import LLAMA_3_8B

from .models import Model
from .split_models import QWEN3_30B_A3B

#: Llama 3.1's layers, whose shapes are those of Llama 3
_LLAMA_31_8B = {**LLAMA_3_8B, "num_hidden_layers": 2}


def _model(config: dict[str, Any], **quantization: Any) -> Model:
    return Model(
        config={**config, "quantization_config": quantization},
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        max_model_len=8192,
        num_blocks=(20000,),
    )


QUANTIZED_MODELS: dict[str, Model] = {
    "Llama-3.1-8B in AWQ": _model(_LLAMA_31_8B, quant_method="awq", bits=4, group_size=128, zero_point=True),
    "Llama-3.1-8B in FP8": _model(_LLAMA_31_8B, quant_method="fp8", activation_scheme="dynamic"),
    "Qwen3-30B-A3B in GPTQ": _model(
        QWEN3_30B_A3B, quant_method="gptq", bits=4, group_size=128, desc_act=False, sym=True
    ),
}
#: bytes in bfloat16 of the smallest matrix that a layer multiplies by: none of them is among the temporaries of a step
#: of single tokens
SMALLEST_MATRIX = {
    "Llama-3.1-8B in AWQ": 2 * 4096 * 4096,
    "Llama-3.1-8B in FP8": 2 * 4096 * 4096,
    "Qwen3-30B-A3B in GPTQ": 2 * 2048 * 4096,
}
