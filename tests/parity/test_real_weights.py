"""Real models, from GGUF: our logits against transformers with the same dequantised weights, float32, real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel

from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats.gguf import GGUFReader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
DECODES = 8


@pytest.mark.thorough
def test_smollm2(smollm2_gguf: Path):
    compare(smollm2_gguf, "Llama", tokens=200)


@pytest.mark.large
def test_qwen25(qwen25_gguf: Path):
    compare(qwen25_gguf, "Qwen2", tokens=64)


def compare(path: Path, family: str, tokens: int) -> None:
    ids = load_tokenizer(path)(TEXT)["input_ids"][:tokens]
    assert len(ids) == tokens
    expected = hf_logits(path, family, ids)
    checkpoint = Checkpoint(path)
    config = model_config(checkpoint.config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(decoder_specs(config), jnp.dtype(jnp.float32), device, seed=0, progress=False)
    model = PagedModel(config, params, block_size=16, max_len=256, num_seqs=2, buckets=(2, 192))
    ends = [37, tokens - DECODES, *range(tokens - DECODES + 1, tokens + 1)]
    parts = [model.step({"a": ids[first:end]})["a"] for first, end in zip([0, *ends], ends, strict=False)]
    worst = float(np.max(np.abs(np.concatenate(parts) - expected)))
    print(f"max abs difference {worst:.1e}")
    assert worst < 1e-3


def hf_logits(path: Path, family: str, ids: list[int]) -> np.ndarray:
    with GGUFReader(path) as reader:
        config: dict[str, Any] = reader.config()
        state = {name: torch.from_numpy(np.array(reader.read(name), np.float32)) for name in reader.names()}
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    model.tie_weights()
    # what a model computes when it is made, it did not compute on "meta"
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]), use_cache=False).logits[0].numpy()
