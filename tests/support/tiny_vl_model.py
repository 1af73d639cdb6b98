"""A Qwen2.5-VL and a Qwen2-VL small enough for tests: random weights of transformers', drawn so that every patch and
every token matters, a tokenizer of single bytes with the marks of pictures, a chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_model import EOS, byte_tokenizer
from tokenizers import AddedToken

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
START, END, IMAGE, VIDEO = range(EOS + 1, EOS + 5)
VOCAB_SIZE = 264
#: where a picture stands in a text
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
    f"{PICTURE}{{% endif %}}{{% endfor %}}{{% endif %}}\n{{% endfor %}}"
)
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "hidden_act": "silu",
        "out_hidden_size": 64,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        # two merged patches
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen2_vl": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}


def write_tiny_vl_model(folder: Path, family: str = "qwen2_5_vl", *, seed: int = 0) -> Path:
    """Write the model into `folder`, which exists, as the hub has such checkpoints: a flat config.json."""
    import torch
    import transformers

    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "dtype": "float32",
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_config": {"model_type": family, **VISION[family]},
        **TEXT,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    # small pictures stay small
    preprocessor = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    torch.manual_seed(seed)
    model = getattr(transformers, ARCHITECTURES[family])(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 4.0 if "lm_head" in name else 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0, gain / float(np.prod(weight.shape[1:])) ** 0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
        model.lm_head.weight[EOS:] = 0  # marks are not generated, which transformers would take for pictures
    model.save_pretrained(folder / "made", safe_serialization=True)
    (folder / "made" / "model.safetensors").rename(folder / "model.safetensors")
    for path in (folder / "made").iterdir():
        path.unlink()
    (folder / "made").rmdir()
    return folder


def picture(width: int, height: int, seed: int = 0) -> Any:
    """A picture of Pillow's, of noise and a gradient."""
    from PIL import Image

    random = np.random.default_rng((width, height, seed))
    noise = random.integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] * random.random(3)
    return Image.fromarray(((noise + ramp) / 2).astype(np.uint8))
