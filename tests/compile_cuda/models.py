"""Real models' shapes, as their config.json has them, and the limits that each is compiled with."""

from __future__ import annotations

import dataclasses
from typing import Any

from support.large_models import LLAMA_31_8B, LLAMA_32_1B


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    config: dict[str, Any]
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int
    #: blocks of the KV cache; the first is what most programs are compiled for
    num_blocks: tuple[int, ...]
    #: None: it generates; otherwise which tokens are pooled
    pooling_type: str | None = None
    #: that it is split over
    devices: int = 1
    #: whether they have experts as wholes
    expert_parallel: bool = False
    #: whether programs of each kind are compiled, not only the largest
    all_programs: bool = False
    #: drafts of a step; the programs that check them are compiled, and no others
    drafts: int = 0
    #: of the model that makes them; None: they are n-grams
    draft: dict[str, Any] | None = None
    #: of the EAGLE-3 head that does
    eagle3: dict[str, Any] | None = None
    #: share of the layers that lie in the host's memory; the largest steps are compiled, and nothing else
    offloaded: float = 0.0
    #: (how many the device has, their rank); the largest steps with them are compiled, and nothing else
    adapters: tuple[int, int] | None = None
    #: patches of the largest picture; the programs that encode pictures are compiled, the largest step, and no others
    encoder_patches: int = 0


def _gemma3(**shape: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262208,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        **shape,
    }


_QWEN25_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}

#: yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
_EAGLE3_OF_8B: dict[str, Any] = {
    **LLAMA_31_8B,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 32000,
}
_LLAMA = Model(config=LLAMA_31_8B, max_model_len=131072, num_blocks=(20000,))

MODELS: dict[str, Model] = {
    "SmolLM2-135M": Model(
        config={
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        max_model_len=8192,
        num_blocks=(8000, 80000),
    ),
    "Llama-3.1-8B": dataclasses.replace(_LLAMA, num_blocks=(20000, 5000), all_programs=True),
    "Llama-3.1-8B, drafts": dataclasses.replace(_LLAMA, drafts=5),
    "Llama-3.1-8B, drafts of Llama-3.2-1B": dataclasses.replace(_LLAMA, drafts=5, draft=LLAMA_32_1B),
    "Llama-3.1-8B, drafts of EAGLE-3": dataclasses.replace(_LLAMA, drafts=5, eagle3=_EAGLE3_OF_8B),
    "Llama-3.1-8B, half on the host": dataclasses.replace(_LLAMA, offloaded=0.5),
    "Llama-3.1-8B, adapters": dataclasses.replace(_LLAMA, adapters=(4, 16)),
    "Qwen2.5-7B": Model(
        config={"architectures": ["Qwen2ForCausalLM"], **_QWEN25_7B},
        max_model_len=32768,
        num_blocks=(40000,),
    ),
    "Gemma-3-4B": Model(
        config=_gemma3(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        max_model_len=131072,
        num_blocks=(40000,),
    ),
    "Gemma-3-4B, images": Model(
        config={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": _gemma3(
                hidden_size=2560,
                intermediate_size=10240,
                num_hidden_layers=34,
                num_attention_heads=8,
                num_key_value_heads=4,
            ),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
        max_model_len=32768,
        num_blocks=(20000,),
        encoder_patches=4096,
    ),
    "Qwen2.5-VL-7B, images": Model(
        config={
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            **_QWEN25_7B,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        max_model_len=32768,
        num_blocks=(20000,),
        encoder_patches=16384,
    ),
    "Gemma-3-27B": Model(
        config=_gemma3(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        max_model_len=32768,
        num_blocks=(10000,),
    ),
    "Qwen2.5-7B as embedder": Model(
        config={"architectures": ["Qwen2Model"], **_QWEN25_7B},
        max_num_seqs=64,
        max_model_len=8192,
        num_blocks=(20000,),
        pooling_type="LAST",
    ),
    "BGE-large": Model(
        config={
            "architectures": ["BertModel"],
            "vocab_size": 30522,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
        max_num_seqs=64,
        max_model_len=512,
        num_blocks=(4000,),
        pooling_type="CLS",
    ),
}
