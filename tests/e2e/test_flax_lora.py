"""Adapters trained with flax.nnx beside the engine, saved, read by PEFT, and served in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support.adapters import Oracle
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams, TokensPrompt
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.flax import Model, to_nnx
from jaxllm.flax_adapters import TrainableAdapters
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader

TEXT = b"the quick brown fox jumps over the lazy dog"
#: [2, 43]
TOKENS = jnp.asarray([list(TEXT), list(TEXT[::-1])], jnp.int32)
PROMPT = 8


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    from support.tiny_model import write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    with LLM(folder, **SMALL, enable_lora=True, max_lora_rank=8) as llm:
        yield llm


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    wanted = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(lambda model: -model.token_logprobs(tokens).mean(), argnums=wanted)(model)
    optimizer.update(model, gradients)
    return loss


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj", "down_proj"]])
def test_a_trained_adapter_is_read_by_peft_and_served(llm: LLM, tmp_path: Path, targets: list[str] | None):
    model = to_nnx(llm, lora_rank=6, lora_alpha=9, target_modules=targets)
    base = np.asarray(to_nnx(llm).token_logprobs(TOKENS))
    np.testing.assert_array_equal(model.token_logprobs(TOKENS), base)
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.LoRAParam)
    losses = [float(train(model, optimizer, TOKENS)) for _ in range(25)]
    assert losses[-1] < losses[0] / 3
    # the weights are as they were, and the engine's own
    (params,) = llm.apply_model(lambda params: params)
    for own, trained in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(own, trained)

    ours = np.asarray(model.token_logprobs(TOKENS))
    model.save_adapter(tmp_path / "adapter")
    oracle = Oracle(Path(llm.llm_engine.engine.args.model), {"mine": tmp_path / "adapter"})
    for ids, of_adapter, of_base in zip(TOKENS.tolist(), ours, base, strict=True):
        np.testing.assert_allclose(oracle.logprobs("mine", ids[:1], ids[1:]), of_adapter, atol=1e-4)
        np.testing.assert_allclose(oracle.logprobs(None, ids[:1], ids[1:]), of_base, atol=1e-4)

    request = LoRARequest("mine", 1, tmp_path / "adapter", load_inplace=True)
    prompts = [TokensPrompt(prompt_token_ids=TOKENS[0].tolist())] * 2
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, asked, lora_request=[request, None], use_tqdm=False)
    for output, expected in zip(outputs, (ours[0], base[0]), strict=True):
        assert output.prompt_logprobs is not None
        steps = zip(TOKENS[0].tolist()[1:], output.prompt_logprobs[1:], strict=True)
        found = [scores[token].logprob for token, scores in steps if scores]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_cannot_be_trained_is_refused(llm: LLM, tmp_path: Path):
    with pytest.raises(ValidationError, match=r"target_modules has \['x_proj'\], .* those that it has: \['down_proj'"):
        to_nnx(llm, lora_rank=4, target_modules=["x_proj"])
    with pytest.raises(ValidationError, match="lora_rank must be at least 1, got 0"):
        to_nnx(llm, lora_rank=0)
    with pytest.raises(ValidationError, match="lora_alpha need lora_rank"):
        to_nnx(llm, lora_alpha=4)
    with pytest.raises(ValidationError, match="save_adapter takes a model with adapters"):
        to_nnx(llm).save_adapter(tmp_path)
    model = to_nnx(llm, lora_rank=4)
    for whole in (model, nnx.state(model)):
        with pytest.raises(ValidationError, match="update_weights takes weights, .* model.save_adapter"):
            llm.update_weights(whole)


def test_modules_whose_names_end_alike_have_adapters_of_their_own(tmp_path: Path):
    """GPT-2 calls two matrices of a layer c_proj."""
    sizes = {"vocab_size": 300, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40, "n_positions": 64}
    config = model_config({**sizes, "architectures": ["GPT2LMHeadModel"]})
    specs, device = decoder_specs(config), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = loader.dummy(specs, jnp.dtype("float32"), device)
    asked: dict[str, Any] = {"rank": 2, "alpha": 2.0, "base": "", "seed": 0}
    adapters = TrainableAdapters(specs, targets=None, **asked)
    ours = np.asarray(Model(config, params, adapters).token_logprobs(TOKENS))
    np.testing.assert_array_equal(ours, Model(config, params).token_logprobs(TOKENS))
    adapters.save(tmp_path)
    shapes = {name: array.shape for name, array in load_file(tmp_path / "adapter_model.safetensors").items()}
    module = "base_model.model.transformer.h.1."
    assert (shapes[f"{module}attn.c_proj.lora_A.weight"], shapes[f"{module}mlp.c_proj.lora_A.weight"]) == (
        *((2, 24), (2, 40)),
    )
    for targets, found in (
        (("c_proj",), ("attn.c_proj", "mlp.c_proj")),
        (("mlp.c_proj", "c_fc"), ("c_fc", "mlp.c_proj")),
    ):
        assert TrainableAdapters(specs, targets=targets, **asked).targets == found
