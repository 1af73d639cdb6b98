"""EAGLE heads of a tiny model: their checkpoints, and what they compute, in torch from the published architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

HEADS, KV_HEADS, HEAD_DIM, MLP = 2, 1, 16, 96
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "intermediate_size": MLP,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
#: tokens that the EAGLE-3 head drafts: every second one
DRAFTED = 128


def write_eagle3(
    folder: Path,
    *,
    size: int = 48,
    hidden: int = 64,
    keeps: tuple[int, ...] = (0, 1, 1),
    layers: int = 1,
    vocab: int = CONFIG["vocab_size"],
) -> Path:
    """A head of another width than the model's, with tables of its own, and fewer tokens."""
    random, first = np.random.default_rng(3), "midlayer" if layers == 1 else "layers.0"
    weights = {
        **{f"{first}.{name}": array for name, array in _layer(random, size, 2 * size).items()},
        f"{first}.hidden_norm.weight": _norm(random, size),
        f"{first}.input_layernorm.weight": _norm(random, size),
        **_others(random, size, layers),
        "embed_tokens.weight": _matrix(random, vocab, size),
        "fc.weight": _matrix(random, size, len(keeps) * hidden),
        "norm.weight": _norm(random, size),
        "lm_head.weight": _matrix(random, DRAFTED, size, 4.0),
        "d2t": np.arange(DRAFTED, dtype=np.int64),
        "t2d": np.arange(vocab) % 2 == 0,
    }
    own = {"hidden_size": size, "draft_vocab_size": DRAFTED, "eagle_aux_hidden_state_layer_ids": list(keeps)}
    own |= {"num_hidden_layers": layers, "vocab_size": vocab}
    return _written(folder, {**CONFIG, **own, "architectures": ["LlamaForCausalLMEagle3"]}, weights)


def write_eagle(folder: Path, *, size: int = 64, layers: int = 1) -> Path:
    """A head of the first kind, which takes the model's tables."""
    random = np.random.default_rng(4)
    weights = {"fc.weight": _matrix(random, size, 2 * size), "fc.bias": _norm(random, size) - 1}
    weights |= {f"layers.0.{name}": array for name, array in _layer(random, size, size).items()}
    weights |= _others(random, size, layers)
    return _written(folder, {**CONFIG, "hidden_size": size, "num_hidden_layers": layers}, weights)


def _others(random: np.random.Generator, size: int, layers: int) -> dict[str, np.ndarray]:
    """Layers behind the first one."""
    found: dict[str, np.ndarray] = {}
    for number in range(1, layers):
        found[f"layers.{number}.input_layernorm.weight"] = _norm(random, size)
        found |= {f"layers.{number}.{name}": array for name, array in _layer(random, size, size).items()}
    return found


def _written(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _matrix(random: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
    return (random.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)


def _norm(random: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.3 * random.standard_normal(size)).astype(np.float32)


def _layer(random: np.random.Generator, size: int, inputs: int) -> dict[str, np.ndarray]:
    parts = {
        "self_attn.q_proj": _matrix(random, HEADS * HEAD_DIM, inputs, 2.0),
        "self_attn.k_proj": _matrix(random, KV_HEADS * HEAD_DIM, inputs, 2.0),
        "self_attn.v_proj": _matrix(random, KV_HEADS * HEAD_DIM, inputs),
        "self_attn.o_proj": _matrix(random, size, HEADS * HEAD_DIM),
        "mlp.gate_proj": _matrix(random, MLP, size),
        "mlp.up_proj": _matrix(random, MLP, size),
        "mlp.down_proj": _matrix(random, size, MLP),
        "post_attention_layernorm": _norm(random, size),
    }
    return {f"{name}.weight": array for name, array in parts.items()}


class EagleOracle:
    """Drafts of a head for a model, each computed from nothing: the whole sequence, every time."""

    def __init__(self, model: Path, head: Path):
        from safetensors.torch import load_file

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.weights = load_file(head / "model.safetensors")
        self.config = json.loads((head / "config.json").read_text())
        self.is_third = "d2t" in self.weights

    @torch.no_grad()
    def drafts(self, token_ids: list[int], number: int, bias: dict[int, float]) -> list[int]:
        """The head's most likely tokens behind `token_ids`, of which the last one the model has not read.

        Args:
            bias: added to scores, by token.
        """
        states = self.model(torch.tensor([token_ids[:-1]]), output_hidden_states=True).hidden_states
        if self.is_third:
            hidden = torch.cat([states[i][0] for i in self.config["eagle_aux_hidden_state_layer_ids"]], dim=1)
            hidden = hidden @ self.weights["fc.weight"].T
        else:
            hidden = states[-1][0]
        found: list[int] = []
        for _ in range(number):
            tokens = torch.tensor([*token_ids[1:], *found])
            scores, out = self._forward(tokens, hidden)
            for token, extra in bias.items():
                scores[token] += extra
            found.append(int(scores.argmax()))
            hidden = torch.cat([hidden, out[None]])
        return found

    def _forward(self, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of every token, and the hidden state, at the last of the pairs."""
        w = self.weights
        if not self.is_third:
            embedding = self.model.get_input_embeddings().weight[tokens]
            x = torch.cat([embedding, hidden], dim=1) @ w["fc.weight"].T + w["fc.bias"]
            x = self._behind(self._layer("layers.0.", x, x))
            return self.model.get_output_embeddings()(x[-1]), x[-1]
        first = "midlayer" if "midlayer.hidden_norm.weight" in w else "layers.0"
        embedding = _rms(w["embed_tokens.weight"][tokens], w[f"{first}.input_layernorm.weight"])
        pair = torch.cat([embedding, _rms(hidden, w[f"{first}.hidden_norm.weight"])], dim=1)
        x = self._behind(self._layer(f"{first}.", hidden, pair))
        scores = torch.full((self.config["vocab_size"],), -torch.inf)
        own = _rms(x[-1], w["norm.weight"]) @ w["lm_head.weight"].T
        scores[torch.arange(len(own)) + w["d2t"]] = own
        return scores, x[-1]

    def _behind(self, x: torch.Tensor) -> torch.Tensor:
        """Through the layers behind the first one."""
        for number in range(1, self.config["num_hidden_layers"]):
            prefix = f"layers.{number}."
            x = self._layer(prefix, x, _rms(x, self.weights[f"{prefix}input_layernorm.weight"]))
        return x

    def _layer(self, prefix: str, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        def times(module: str, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weights[f"{prefix}{module}.weight"].T

        length = len(x)
        query = _turned(times("self_attn.q_proj", normed).reshape(length, HEADS, HEAD_DIM))
        key = _turned(times("self_attn.k_proj", normed).reshape(length, KV_HEADS, HEAD_DIM))
        value = times("self_attn.v_proj", normed).reshape(length, KV_HEADS, HEAD_DIM)
        key, value = (array.repeat_interleave(HEADS // KV_HEADS, dim=1) for array in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(length, -1)
        x = x + times("self_attn.o_proj", attended)
        normed = _rms(x, self.weights[f"{prefix}post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(times("mlp.gate_proj", normed)) * times("mlp.up_proj", normed)
        return x + times("mlp.down_proj", gated)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weight


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings of [T, heads, HEAD_DIM], the first at position 0."""
    half = HEAD_DIM // 2
    angle = torch.outer(torch.arange(len(x)).float(), CONFIG["rope_theta"] ** (-torch.arange(half) / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
