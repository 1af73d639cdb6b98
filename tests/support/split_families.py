"""Read a checkpoint of several families onto one device and onto four, compute a step on both, and compare; then
compare what the four would save with what was read. Prints the families.

Run with ``JAX_NUM_CPU_DEVICES=4``.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from support.split_model import BLOCK_SIZE, BLOCKS, step, two_sequences
from support.tiny_model import CONFIG

from jaxllm.config.cache import kv_cache_groups
from jaxllm.layers.context import Context
from jaxllm.layers.weight import is_spec
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.collectives import count_collectives, expected_collectives
from jaxllm.parallel.mesh import make_mesh, on_each_device
from jaxllm.parallel.rules import cache_axes, layer_sums, local_model, split_axes, spread_experts
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats import hugging_face

DEVICES = 4
#: of tensors that are split by their parts, by heads and over all heads; two KV heads are fewer than the devices
FAMILIES: dict[str, dict[str, Any]] = {
    "Phi3": {},
    "GPTNeoX": {},
    # whose matrices are [in, out], and whose positions every device has
    "GPT2": {"n_embd": 64, "n_inner": 128},
    # KV heads in turn with their queries; a bias of the scores
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "Phi": {},
    "Olmo2": {},
    "Cohere": {"use_qk_norm": True},
    "Mixtral spread": {"num_local_experts": 8, "intermediate_size": 21},
    "Qwen2Moe": {
        "num_experts": 6,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
    },
    "GptOss": {"num_local_experts": 6, "intermediate_size": 20},
    "GraniteMoeShared": {"num_local_experts": 6, "intermediate_size": 20, "shared_intermediate_size": 20},
    "Ernie4_5_Moe spread": {"moe_num_experts": 8, "moe_intermediate_size": 20},
    "DeepseekV2": {
        "kv_lora_rank": 24,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
    },
}


def main() -> None:
    for name, fields in FAMILIES.items():
        family, _, spread = name.partition(" ")
        with tempfile.TemporaryDirectory() as folder:
            kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
            config = {**CONFIG, **fields, "architectures": [f"{family}{kind}"]}
            compare(Path(folder), config, spread=bool(spread))
        print(name)


def compare(folder: Path, config: dict[str, Any], *, spread: bool) -> None:
    """Args: spread: whether devices have experts as wholes."""
    model = model_config(config)
    if spread:
        model = spread_experts(model)
        assert isinstance(model, DecoderConfig)
    specs, random, groups = decoder_specs(model), np.random.default_rng(0), kv_cache_groups(model.kv_specs)
    tensors = {
        name: (random.standard_normal(spec.tensor_shape(part)) / part.shape[-1] ** 0.5).astype(np.float32)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    batch, computed = two_sequences(random, model.vocab_size), []
    for devices in (1, DEVICES):
        mesh = make_mesh(jax.devices()[:devices])
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        params = Checkpoint(folder).load(
            specs, jnp.dtype("float32"), whole, prefix=model.names.prefix, seed=0, progress=False
        )
        part, context = local_model(model, devices), Context(split=split_axes(mesh.shape))
        cache_spec = cache_axes(model) if devices > 1 else jax.P()
        shape = [model.num_layers * BLOCKS, *part.kv_specs[0].page_shape(BLOCK_SIZE)]
        if cache_spec != jax.P():
            shape[1] *= devices
        arguments = (
            params,
            jnp.zeros(shape, device=jax.sharding.NamedSharding(mesh, cache_spec)),
            jax.device_put(batch, whole),
        )
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arguments)
        function = on_each_device(functools.partial(step, groups, context, part), mesh, shapes, (cache_spec, jax.P()))
        compiled = jax.jit(function).lower(*arguments).compile()
        computed.append(compiled(*arguments)[1])
    np.testing.assert_allclose(computed[1], computed[0], rtol=2e-5, atol=2e-5)
    counted = count_collectives(compiled.as_text() or "")
    np.testing.assert_equal(counted, expected_collectives(model.num_layers, DEVICES, layer_sums=layer_sums(model)))
    saved = {tensor.name: tensor.value() for tensor in hugging_face.tensors(specs, params)}
    np.testing.assert_equal(saved, tensors)


if __name__ == "__main__":
    main()
