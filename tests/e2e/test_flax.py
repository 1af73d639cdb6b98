"""Training with flax.nnx and optax in the process that generates: `jaxllm.flax`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams, TokensPrompt
from jaxllm.flax import Model, to_nnx

TEXT = b"the quick brown fox jumps over the lazy dog"
#: [2, 43]
TOKENS = jnp.asarray([list(TEXT), list(TEXT[::-1])], jnp.int32)
PROMPT = 8


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **SMALL) as llm:
        yield llm


def engine_logprobs(llm: LLM) -> np.ndarray:
    """What the engine says of TOKENS but their first, as prompts."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in TOKENS.tolist()]
    found = []
    for ids, output in zip(TOKENS.tolist(), llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append([scores[token].logprob for token, scores in steps if scores])
    return np.array(found)


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: -model.token_logprobs(tokens).mean())(model)
    optimizer.update(model, gradients)
    return loss


def test_ten_steps_of_training_and_generating_with_the_new_weights(engine: LLM):
    model = to_nnx(engine)
    assert model.weights.norm.dtype == jnp.float32
    before = engine_logprobs(engine)
    np.testing.assert_allclose(before, model.token_logprobs(TOKENS), atol=1e-4)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(train(model, optimizer, TOKENS)) for _ in range(10)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 10
    # the engine's own weights are as they were
    np.testing.assert_array_equal(engine_logprobs(engine), before)

    engine.update_weights(nnx.state(model))
    after = engine_logprobs(engine)
    np.testing.assert_allclose(after, model.token_logprobs(TOKENS), atol=1e-4)
    assert after.mean() > -losses[-1]
    prompt = TokensPrompt(prompt_token_ids=TOKENS[0, :PROMPT].tolist())
    (output,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=35, logprobs=0), use_tqdm=False)
    (completion,) = output.outputs
    assert list(completion.token_ids) == TOKENS[0, PROMPT:].tolist() and completion.logprobs is not None
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    generated = [scores[token].logprob for token, scores in steps]
    np.testing.assert_allclose(generated, model.token_logprobs(TOKENS)[0, PROMPT - 1 :], atol=1e-4)

    # what training does not change goes back as a module, too; float32 weights in bfloat16
    with pytest.raises(ValueError, match=r"weights\.head is missing"):
        state = nnx.state(model)
        del state["weights"]["head"]
        engine.update_weights(state)
    engine.update_weights(to_nnx(engine, dtype=jnp.bfloat16))
    (params,) = engine.apply_model(lambda params: params)
    expected = np.asarray(jnp.asarray(model.params.norm).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(params.norm, expected)


def test_an_engine_that_nobody_trains_imports_no_flax(tiny_model: Path):
    code = (
        "import sys\n"
        "from jaxllm import LLM\n"
        f"with LLM({str(tiny_model)!r}, skip_tokenizer_init=True, **{SMALL!r}) as llm:\n"
        "    (params,) = llm.apply_model(lambda params: params)\n"
        "    llm.update_weights(params)\n"
        "print(*[name for name in ('flax', 'optax', 'orbax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
