"""A tiny DeepSeek-V3 with a layer for predicting several tokens, and what that computes, by transformers' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from support.latent_cache import DEEPSEEK, write_random
from transformers import AutoModelForCausalLM

from jaxllm.layers.weight import is_spec
from jaxllm.models.draft_head import head_specs
from jaxllm.models.mtp import mtp_head
from jaxllm.models.registry import model_config

CONFIG: dict[str, Any] = {**DEEPSEEK, "num_nextn_predict_layers": 1}


def write_mtp(folder: Path) -> Path:
    """The model with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_random(folder, CONFIG)
    random, tensors = np.random.default_rng(2), load_file(folder / "model.safetensors")
    specs = head_specs(*mtp_head(CONFIG, model_config(CONFIG), lambda name: True))
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        for name, part in spec.tensors():
            shape = spec.tensor_shape(part)
            drawn = random.standard_normal(shape)
            tensors[name] = 1 + 0.3 * drawn if "norm" in name else 2 * drawn / np.sqrt(shape[-1])
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class MtpOracle:
    """Drafts of the layer, each computed from nothing: the whole sequence, every time."""

    def __init__(self, model: Path):
        from safetensors.torch import load_file

        self.number = CONFIG["num_hidden_layers"]
        # its layer is one more of the model's
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, num_hidden_layers=self.number + 1, dtype=torch.float32, attn_implementation="sdpa"
        )
        prefix = f"model.layers.{self.number}."
        weights = load_file(model / "model.safetensors")
        self.weights = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}

    @torch.no_grad()
    def drafts(self, token_ids: list[int], number: int, bias: dict[int, float]) -> list[int]:
        """As `EagleOracle.drafts`."""
        states = self.model(torch.tensor([token_ids[:-1]]), output_hidden_states=True).hidden_states
        hidden = self.model.model.norm(states[self.number])[0]
        found: list[int] = []
        for _ in range(number):
            tokens = torch.tensor([*token_ids[1:], *found])
            w = self.weights
            pair = [self._rms(w["embed_tokens.weight"][tokens], "enorm"), self._rms(hidden, "hnorm")]
            x = (torch.cat(pair, dim=1) @ w["eh_proj.weight"].T)[None]
            positions = torch.arange(len(tokens))[None]
            turned = self.model.model.rotary_emb(x, positions)
            out = self.model.model.layers[self.number](x, position_ids=positions, position_embeddings=turned)
            out = (out[0] if isinstance(out, tuple) else out).reshape(len(tokens), -1)[-1]
            scores = self._rms(out, "shared_head.norm") @ w["shared_head.head.weight"].T
            for token, extra in bias.items():
                scores[token] += extra
            found.append(int(scores.argmax()))
            hidden = torch.cat([hidden, out[None]])
        return found

    def _rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + CONFIG["rms_norm_eps"]) * self.weights[f"{name}.weight"]
