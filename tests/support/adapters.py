"""Adapters that PEFT saves of tiny models, and what PEFT says of them: the oracle of tests of LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from jaxllm.api.outputs import RequestOutput

#: adapters by name -> what PEFT is told; ranks and alphas of modules differ
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 12, "target_modules": r".*\.self_attn\.(q|v)_proj"},
    "all": {
        **{"r": 6, "lora_alpha": 9, "target_modules": "all-linear", "use_rslora": True},
        **{"rank_pattern": {"q_proj": 3, "down_proj": 8}, "alpha_pattern": {"k_proj": 20}},
    },
    "some layers": {"r": 2, "target_modules": ["o_proj", "gate_proj", "up_proj"], "layers_to_transform": [1]},
}


#: those with embeddings and heads of their own
TABLES: dict[str, dict[str, Any]] = {
    "attention": ADAPTERS["attention"],
    "whole tables": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "changed tables": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "a head": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


def save_adapter(model: Path, folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Save an adapter of a model with random A and B, and tables that are not the model's; returns its folder."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".modules_to_save." in name:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape)
    with warnings.catch_warnings():
        # that it saves embeddings, too, where they are changed
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder))
    return folder


class Oracle:
    """Log-probabilities by PEFT, in float32.

    Args:
        model: the base model's folder.
        adapters: name -> the adapter's folder.
    """

    def __init__(self, model: Path, adapters: dict[str, Path]):
        def base() -> Any:
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

        # each of its own: PEFT does not put a change of an embedding beside a whole one
        self._models: dict[str | None, Any] = {None: base()}
        for name, folder in adapters.items():
            self._models[name] = PeftModel.from_pretrained(base(), str(folder)).eval()

    @torch.no_grad()
    def logprobs(self, name: str | None, prompt: Sequence[int], outputs: Sequence[int]) -> list[float]:
        """Of each output token, with an adapter or (None) without."""
        scores = self._models[name](torch.tensor([[*prompt, *outputs]])).logits
        found = torch.log_softmax(scores[0].double(), -1)
        return [found[len(prompt) - 1 + i, token].item() for i, token in enumerate(outputs)]


def difference(oracle: Oracle, name: str | None, output: RequestOutput) -> float:
    """Between an output's log-probabilities and the oracle's, at most."""
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.token_ids) == len(completion.logprobs) > 0
    ours = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    theirs = oracle.logprobs(name, output.prompt_token_ids or [], completion.token_ids)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
