"""Models that see pictures, small enough for tests: random weights of transformers', drawn so that every patch and
every token matters, a tokenizer of single bytes with the marks of pictures, a chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_model import EOS, byte_tokenizer
from tokenizers import AddedToken

_QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
#: family -> its marks, ids from EOS + 1 on
MARKS = {
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    # the place of a picture's vectors first
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "llava": ["<image>"],
    "llava-siglip": ["<image>"],
    "llava-next": ["<image>"],
}
#: ids of Qwen's marks
START, END, IMAGE, VIDEO = range(EOS + 1, EOS + 5)
#: where a picture stands in a text; of all but Qwen's the mark's id is the first behind EOS
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE = {name: QWEN_PICTURE if marks is _QWEN else marks[0] for name, marks in MARKS.items()}
PICTURE["gemma3"] = "<start_of_image>"
SQUARE_IMAGE = EOS + 1
VOCAB_SIZE = 264
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
    "tie_word_embeddings": False,
}
_QWEN_TEXT: dict[str, Any] = {
    **TEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
_SQUARE_TEXT = {**TEXT, "pad_token_id": None}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 5,
}
#: of Qwen's models
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


def _qwen(family: str, architecture: str) -> dict[str, Any]:
    """As the hub has such checkpoints: a flat config.json."""
    return {
        "architectures": [architecture],
        "model_type": family,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_config": {"model_type": family, **VISION[family]},
        **_QWEN_TEXT,
    }


_LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": SQUARE_IMAGE,
    "tie_word_embeddings": False,
    "text_config": {**_SQUARE_TEXT, "model_type": "llama"},
    # 16 patches and a rest
    "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 22, "projection_dim": 16},
}
_PINPOINTS = [[22, 44], [44, 22], [44, 44]]
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": _qwen("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": _qwen("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        # of 64 patches, means of 2 x 2
        "mm_tokens_per_image": 16,
        "image_token_index": SQUARE_IMAGE,
        "boi_token_index": SQUARE_IMAGE + 1,
        "eoi_token_index": SQUARE_IMAGE + 2,
        "tie_word_embeddings": False,
        # a window that is shorter than a picture, and ends in it
        "text_config": {
            **_SQUARE_TEXT,
            "model_type": "gemma3_text",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 40, "vision_use_head": False},
    },
    "llava": _LLAVA,
    "llava-siglip": {
        **_LLAVA,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1, 1],
        "text_config": {**_SQUARE_TEXT, "model_type": "qwen2"},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 20, "vision_use_head": False},
    },
    "llava-next": {
        **_LLAVA,
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": _PINPOINTS,
    },
}
#: those whose pictures become squares
SQUARE = [name for name, marks in MARKS.items() if marks is not _QWEN]
_QWEN_PIXELS = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64, "patch_size": 14, "merge_size": 2}
_CLIP_PIXELS = {"size": {"shortest_edge": 22}, "crop_size": {"height": 22, "width": 22}}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    # small pictures stay small
    "qwen2_5_vl": _QWEN_PIXELS,
    "qwen2_vl": _QWEN_PIXELS,
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 40, "width": 40}},
    "llava": {"image_processor_type": "CLIPImageProcessor", **_CLIP_PIXELS},
    "llava-siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 20}},
    "llava-next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": _PINPOINTS,
        **_CLIP_PIXELS,
    },
}


def write_seeing_model(folder: Path, family: str = "qwen2_5_vl", *, seed: int = 0) -> Path:
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
            if family in SQUARE and "norm" in name and name.endswith("weight"):
                # Gemma's have less 1
                own = family == "gemma3" and "layer_norm" not in name and "layernorm" not in name.split("vision")[-1]
                weight.normal_(0, 0.2).add_(0.0 if own or "language" in name and family == "gemma3" else 1.0)
            elif weight.ndim > 1:
                gain = 4.0 if "lm_head" in name else 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                inputs = weight.shape[0] if name.endswith("projection_weight") else np.prod(weight.shape[1:])
                weight.normal_(0, gain / float(inputs) ** 0.5)
            elif family in SQUARE or name.endswith("bias"):
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
