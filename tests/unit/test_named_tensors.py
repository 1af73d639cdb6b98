"""Tensors by their names in memory's place of a checkpoint: torch's, of a model whose head is its embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader
from jaxllm.weights.named_tensors import with_tensors

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 36,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_a_state_dict_of_transformers_becomes_the_weights():
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{name: value for name, value in CONFIG.items() if name != "architectures"})
    tensors = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).state_dict()
    assert "lm_head.weight" in tensors
    specs = decoder_specs(model_config(CONFIG))
    old = loader.dummy(specs, jnp.dtype(jnp.bfloat16), DEVICE, 0)

    def replaced(given: dict[str, Any]) -> Any:
        return with_tensors(
            old,
            given,
            specs=specs,
            sharding=DEVICE,
            dtype=jnp.dtype(jnp.bfloat16),
            prefix="model.",
            has_head=False,
        )

    new = replaced(tensors)
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    wanted = [torch.cat([tensors[layer.format(i, name)] for name in "qkv"]).float().numpy() for i in range(2)]
    [segment] = new.layers
    np.testing.assert_array_equal(np.asarray(segment.qkv, np.float32), np.stack(wanted))
    assert segment.qkv.dtype == jnp.bfloat16
    # of one tensor, the array that it is in is new, and no other
    name = layer.format(1, "k")
    part = replaced({name: tensors[name]})
    before, after = np.asarray(old.layers[0].qkv, np.float32), np.asarray(part.layers[0].qkv, np.float32)
    changed = np.zeros((2, 32), bool)
    changed[1, 16:24] = True
    np.testing.assert_array_equal(after[changed], wanted[1][16:24])
    np.testing.assert_array_equal(after[~changed], before[~changed])
    same = jax.tree.map(lambda one, other: one is other, old, part)
    assert jax.tree.leaves(same).count(False) == 1
    with pytest.raises(ValidationError, match="'score.weight' is no tensor of the model's"):
        replaced({"score.weight": tensors[name]})
