"""Models that see square pictures, small enough for tests: Gemma 3, and LLaVA 1.5 with CLIP's tower or SigLIP's; random
weights of transformers', drawn so that every patch and every token matters, and a tokenizer of single bytes with the
marks of pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_model import EOS, byte_tokenizer
from tokenizers import AddedToken

#: family -> its marks, ids from EOS + 1 on; the place of a picture's vectors first
MARKS = {
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "llava": ["<image>"],
    "llava-siglip": ["<image>"],
}
IMAGE = EOS + 1
#: where a picture stands in a text
PICTURE = {"gemma3": "<start_of_image>", "llava": "<image>", "llava-siglip": "<image>"}
VOCAB_SIZE = 264
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 5,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
#: family -> config.json, but for what all share
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        # of 64 patches, means of 2 x 2
        "mm_tokens_per_image": 16,
        "image_token_index": IMAGE,
        "boi_token_index": IMAGE + 1,
        "eoi_token_index": IMAGE + 2,
        "tie_word_embeddings": False,
        # a window that is shorter than a picture, and ends in it
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 40, "vision_use_head": False},
    },
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "model_type": "llama"},
        # 18 patches and a rest
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 22, "projection_dim": 16},
    },
    "llava-siglip": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1, 1],
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 20, "vision_use_head": False},
    },
}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 40, "width": 40}},
    "llava": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 22},
        "crop_size": {"height": 22, "width": 22},
    },
    "llava-siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 20}},
}


def write_tiny_square_model(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write the model into `folder`, which exists."""
    import torch
    import transformers

    config = {**CONFIGS[family], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS[family]])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
        f"{PICTURE[family]}{{% endif %}}{{% endfor %}}{{% endif %}}\n{{% endfor %}}"
    )
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[family]))
    torch.manual_seed(seed)
    architecture = getattr(transformers, config["architectures"][0])
    model = architecture(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                # Gemma's have less 1
                own = family == "gemma3" and "layer_norm" not in name and "layernorm" not in name.split("vision")[-1]
                weight.normal_(0, 0.2).add_(0.0 if own or "language" in name and family == "gemma3" else 1.0)
            elif weight.ndim > 1:
                gain = 4.0 if "lm_head" in name else 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                inputs = weight.shape[0] if name.endswith("projection_weight") else np.prod(weight.shape[1:])
                weight.normal_(0, gain / float(inputs) ** 0.5)
            else:
                weight.normal_(0, 0.2)
        model.lm_head.weight[EOS:] = 0  # marks are not generated, which transformers would take for pictures
    model.save_pretrained(folder / "made", safe_serialization=True)
    for path in (folder / "made").iterdir():
        if path.name == "model.safetensors":
            path.rename(folder / path.name)
        else:
            path.unlink()
    (folder / "made").rmdir()
    return folder
