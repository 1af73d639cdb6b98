"""Tiny models with a layer for predicting several tokens, and what that computes, by transformers' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from support.latent_cache import DEEPSEEK, write_random
from support.tiny_model import CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from jaxllm.layers.weight import is_spec
from jaxllm.models.draft_head import head_specs
from jaxllm.models.mtp import mtp_head
from jaxllm.models.registry import model_config

CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    "GLM-4.5": {
        **{name: value for name, value in DEEPSEEK.items() if "lora" not in name and "rope_head" not in name},
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "head_dim": 16,
        "num_key_value_heads": 2,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    },
    # its layer lies as Qwen3-Next's
    "Qwen3": {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


def write_mtp(folder: Path, model: str = "DeepSeek-V3") -> Path:
    """One of `CONFIGS` with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[model]
    write_random(folder, config)
    random, tensors = np.random.default_rng(2), load_file(folder / "model.safetensors")
    specs = head_specs(*mtp_head(config, model_config(config), lambda name: True))
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        for name, part in spec.tensors():
            shape = spec.tensor_shape(part)
            drawn = random.standard_normal(shape)
            tensors[name] = 1 + 0.3 * drawn if "norm" in name else 2 * drawn / np.sqrt(shape[-1])
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class MtpOracle:
    """Drafts of the layer, each computed from nothing: the whole sequence, every time."""

    def __init__(self, model: Path):
        from safetensors.torch import load_file

        config = json.loads((model / "config.json").read_text())
        self.number, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.is_apart = config["model_type"] == "qwen3"
        # its layer is one more of the model's
        longer = AutoConfig.for_model(**{**config, "num_hidden_layers": self.number + 1})
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, config=longer, dtype=torch.float32, attn_implementation="sdpa"
        )
        prefix = "mtp." if self.is_apart else f"model.layers.{self.number}."
        weights = load_file(model / "model.safetensors")
        self.weights = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        if self.is_apart:
            layer = {name: array for name, array in self.weights.items() if name.startswith("layers.0.")}
            layer = {name.removeprefix("layers.0."): array for name, array in layer.items()}
            self.model.model.layers[self.number].load_state_dict(layer)

    @torch.no_grad()
    def drafts(self, token_ids: list[int], number: int, bias: dict[int, float]) -> list[int]:
        """As `EagleOracle.drafts`."""
        states = self.model(torch.tensor([token_ids[:-1]]), output_hidden_states=True).hidden_states
        hidden = self.model.model.norm(states[self.number])[0]
        found: list[int] = []
        for _ in range(number):
            tokens = torch.tensor([*token_ids[1:], *found])
            x = self._of_pairs(tokens, hidden)[None]
            positions = torch.arange(len(tokens))[None]
            turned = self.model.model.rotary_emb(x, positions)
            out = self.model.model.layers[self.number](x, position_ids=positions, position_embeddings=turned)
            out = (out[0] if isinstance(out, tuple) else out).reshape(len(tokens), -1)[-1]
            normed = self._rms(out, "norm" if self.is_apart else "shared_head.norm")
            head = self.model.lm_head.weight if self.is_apart else self.weights["shared_head.head.weight"]
            scores = normed @ head.T
            for token, extra in bias.items():
                scores[token] += extra
            found.append(int(scores.argmax()))
            hidden = torch.cat([hidden, (normed if self.is_apart else out)[None]])
        return found

    def _of_pairs(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        w, apart = self.weights, self.is_apart
        embeddings = self.model.get_input_embeddings().weight if apart else w["embed_tokens.weight"]
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden") if apart else ("enorm", "hnorm")
        pair = [self._rms(x, name) for x, name in zip((embeddings[tokens], hidden), norms, strict=True)]
        return torch.cat(pair, dim=1) @ w["fc.weight" if apart else "eh_proj.weight"].T

    def _rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.eps) * self.weights[f"{name}.weight"]
