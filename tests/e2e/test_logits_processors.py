"""The user's functions run inside every step, on each request's own tokens and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.tiny_model import SMALL

from jaxllm import LLM, LogitsProcessor, SamplingParams
from jaxllm.aliases import JAX_PROCESSOR
from jaxllm.api.errors import ValidationError
from jaxllm.sampling.processors import LogitsState


def follow_the_tokens(logits, state: LogitsState):
    """Allow one token only, which depends on all that a processor can see, where the request asks for it."""
    lane = jnp.arange(state.tokens.shape[1])
    seen = jnp.where(lane < state.length[:, None], state.tokens, 0).sum(1)
    prompt = jnp.where(lane < state.prompt_length[:, None], state.tokens, 0).sum(1)
    # XLA:CPU rounds all these integers exactly
    hot = (state.temperature > 0).astype(jnp.int32)
    step = state.extra_args["step"].astype(jnp.int32)
    token = (seen + 3 * prompt + 5 * state.position + 7 * hot + step) % 256
    only = jnp.where(jnp.arange(logits.shape[1]) == token[:, None], 0.0, -jnp.inf)
    return jnp.where(state.extra_args["step"][:, None] > 0, only, logits)


def followed(prompt: list[int], count: int, *, hot: bool, step: int) -> list[int]:
    """What `follow_the_tokens` makes of a prompt, in plain Python."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) + 3 * sum(prompt) + 5 * len(tokens) + 7 * hot + step) % 256)
    return tokens[len(prompt) :]


def add_bonus(logits, state: LogitsState):
    return logits.at[:, 65].add(state.extra_args["bonus"])


PROMPT = list(range(40))


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    processors = [
        LogitsProcessor(follow_the_tokens, extra_args={"step": 0}),
        LogitsProcessor(add_bonus, extra_args={"bonus": 0.0}),
    ]
    arguments = {
        **SMALL,
        "max_model_len": 144,
        "block_size": 16,
        "num_gpu_blocks_override": 12,
        "logprobs_mode": "processed_logits",
        "max_logprobs": -1,
    }
    with LLM(tiny_model, **arguments, logits_processors=processors) as llm:
        yield llm


def generate(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_they_see_the_requests_own_tokens(llm: LLM):
    """In chunks, beside others, behind prefix hits and after preemptions; greedy and random ones."""
    prompts = [[7], PROMPT, PROMPT + [1, 2], list(range(60, 130)), [3] * 33, PROMPT]
    params, expected = [], []
    for i, prompt in enumerate(prompts):
        hot = i % 2 == 1
        params.append(
            SamplingParams(temperature=float(hot), max_tokens=25, ignore_eos=True, extra_args={"step": i + 1})
        )
        expected.append(followed(prompt, 25, hot=hot, step=i + 1))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert any(output.metrics.num_preemptions for output in outputs)
    (again,) = llm.generate([PROMPT + [9]], params[1], use_tqdm=False)
    assert again.num_cached_tokens == 32
    assert again.outputs[0].token_ids == followed(PROMPT + [9], 25, hot=True, step=2)


def test_defaults_leave_requests_alone(llm: LLM, tiny_model: Path):
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    (tokens,) = generate(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    with torch.no_grad():
        assert tokens == model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_they_run_behind_the_bias_and_before_the_penalties(llm: LLM):
    """Token 65's logit l becomes (l + bias + bonus), then halved by the repetition penalty: it is positive."""
    prompt = [65, 66, 67]

    def logit(**changes: Any) -> float:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True, **changes)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        return (output.outputs[0].logprobs or [{}])[0][65].logprob

    plain = logit()
    assert logit(extra_args={"bonus": 60.0}) == pytest.approx(plain + 60, abs=1e-4)
    changed = logit(extra_args={"bonus": 60.0}, logit_bias={65: 5.0}, repetition_penalty=2.0, presence_penalty=1.0)
    assert changed == pytest.approx((plain + 65) / 2, abs=1e-4)
    # behind the mask: what is forbidden stays so, however large the bonus
    (tokens,) = generate(
        llm, [prompt], SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[70], extra_args={"bonus": 1e9})
    )
    assert tokens == [70] * 3


def test_prompt_logprobs_are_the_models_own(llm: LLM):
    def prompt_logits(**changes: Any) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, **changes)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        return [entry.logprob for position in (output.prompt_logprobs or [])[1:] for entry in (position or {}).values()]

    np.testing.assert_array_equal(prompt_logits(), prompt_logits(extra_args={"step": 3, "bonus": 50.0}))


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"strength": 1.0}, "extra_args has 'strength', which no logits processor declares (declared: bonus, step)"),
        ({"bonus": "much"}, "extra_args['bonus'] must be a number, got 'much' of type str"),
        ({"bonus": float("nan")}, "extra_args['bonus'] must be a finite number, got nan"),
        ({"bonus": 1e39}, "extra_args['bonus'] must fit float32 (at most 3.403e+38), got 1e+39"),
    ],
)
def test_a_bad_extra_argument_fails_alone(llm: LLM, extra_args: dict[str, Any], words: str):
    good = SamplingParams(temperature=0, max_tokens=3, extra_args={"step": 2})
    params = [good, SamplingParams(temperature=0, max_tokens=3, extra_args=extra_args)]
    outputs = llm.generate([PROMPT, PROMPT], params, use_tqdm=False, on_error="return")
    assert words in (outputs[1].error or "")
    assert outputs[0].outputs[0].token_ids == followed(PROMPT, 3, hot=False, step=2)


def test_without_processors_there_are_no_extra_arguments(engine: LLM):
    with pytest.raises(ValidationError, match=r"no logits processor declares \(declared: none\)"):
        generate(engine, [PROMPT], SamplingParams(extra_args={"a": 1}))


def too_narrow(logits, state):
    return logits[:, :-1]


def half(logits, state):
    return logits.astype(jnp.bfloat16)


def nothing(logits, state):
    return None


def on_the_host(logits, state):
    return np.asarray(logits)


def one_argument(logits):
    return logits


def torch_function(logits: torch.Tensor, state):
    return logits


def request_function(output_ids, logits):
    return logits


class VllmProcessor:
    """What a vLLM user might pass."""

    def apply(self, logits):
        return logits


REFUSED: dict[str, tuple[Any, str]] = {
    "shape": (
        [too_narrow],
        "too_narrow must return logits as it got them, float32[8, 257]; it returns float32[8, 256]",
    ),
    "dtype": ([half], "half must return logits as it got them, float32[8, 257]; it returns bfloat16[8, 257]"),
    "nothing": ([nothing], "it returns None of type NoneType"),
    "numpy": (
        [on_the_host],
        "the logits processor on_the_host fails for logits float32[8, 257]: TracerArrayConversion",
    ),
    "signature": ([one_argument], "one_argument fails for logits float32[8, 257]: TypeError"),
    "class": (
        [VllmProcessor],
        "logits_processors[0] is the class VllmProcessor, without the methods apply and update_state of vLLM's",
    ),
    "instance": ([add_bonus, VllmProcessor()], "logits_processors[1] must be a jax function (logits, state) -> logits"),
    "not a list": (add_bonus, "logits_processors must be a list, got <function add_bonus"),
    "undeclared": ([add_bonus], "the logits processor add_bonus fails for logits float32[8, 257]: KeyError: 'bonus'"),
    "path": (["jaxllm"], "logits_processors[0] must be a jax function (logits, state) -> logits, its 'module:name'"),
    "no module": (["no.such:name"], "logits_processors[0]='no.such:name' cannot be imported: No module named"),
    "no name": (["json:nope"], "cannot be imported: module 'json' has no attribute 'nope'"),
    "torch": ([torch_function], "logits_processors[0] takes (logits: 'torch.Tensor', state), which is vLLM's form"),
    "per request": ([request_function], "Pass a jax function (logits, state) -> logits"),
    "class by name": (["json:JSONDecoder"], "is the class JSONDecoder"),
    "two defaults": (
        [LogitsProcessor(half, {"a": 1}), LogitsProcessor(half, {"a": 2})],
        "declare the extra argument 'a', with defaults 1.0 and 2.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_at_the_start(tiny_model: Path, name: str):
    processors, words = REFUSED[name]
    with pytest.raises(ValidationError, match=re.escape(words)):
        LLM(tiny_model, **SMALL, logits_processors=processors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3,), "LogitsProcessor's function must be a jax function"),
        ((add_bonus, ["bonus"]), "extra_args must map names to default numbers, got ['bonus'] of type list"),
        ((add_bonus, {3: 1.0}), "extra_args must have names as keys, got 3"),
        ((add_bonus, {"bonus": "1"}), "extra_args['bonus'] must be a number, got '1'"),
    ],
)
def test_a_wrong_declaration_is_refused(arguments: tuple[Any, ...], words: str):
    with pytest.raises(ValidationError, match=re.escape(words)):
        LogitsProcessor(*arguments)


def test_the_form_that_refusals_show_works(tiny_model: Path):
    processor = eval(JAX_PROCESSOR, {"LogitsProcessor": LogitsProcessor, "jnp": jnp})
    plain = SamplingParams(temperature=0.0, max_tokens=4)
    only = SamplingParams(temperature=0.0, max_tokens=4, extra_args={"target_token": 67})
    with LLM(tiny_model, **SMALL, logits_processors=[processor]) as llm:
        outputs = llm.generate(["hello", "hello"], [plain, only], use_tqdm=False)
    untouched, chosen = (output.outputs[0].token_ids for output in outputs)
    assert chosen == [67] * 4 != untouched
