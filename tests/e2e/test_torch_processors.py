"""Logits processors as vLLM has them, classes for torch, are called for each request with its own tokens."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.adapters import ADAPTERS, save_adapter
from support.tiny_model import SMALL

from jaxllm import LLM, LogitsProcessor, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.torch_logits_processor import (
    BatchUpdate,
    HostProcessor,
    MoveDirectionality,
    RowRequests,
    process_dict_updates,
)

vllms: Any = importlib.import_module("jaxllm.v1.sample.logits_processor")
PROMPT = list(range(40))


def following(prompt: list[int], outputs: list[int], step: int) -> int:
    return (sum(prompt) * 3 + sum(outputs) + 5 * len(outputs) + step) % 256


def followed(prompt: list[int], count: int, step: int) -> list[int]:
    outputs: list[int] = []
    for _ in range(count):
        outputs.append(following(prompt, outputs, step))
    return outputs


class Follower(vllms.LogitsProcessor):
    """A batch's: only one token is left, which depends on all that the request has."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        steps = (sampling_params.extra_args or {}).get("steps", [0])
        if steps == "unknown":
            raise KeyError("no such steps")
        if not isinstance(steps, list):
            raise ValueError(f"steps {steps!r} is no list")

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        assert vllm_config.model_config.get_vocab_size() == 257 and device.type == "cpu"
        self.requests: dict[int, Any] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def state(params: SamplingParams, prompt: list[int] | None, outputs: list[int]) -> Any:
            steps = (params.extra_args or {}).get("steps")
            return None if steps is None else (prompt, outputs, steps[0])

        process_dict_updates(self.requests, batch_update, state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (prompt, outputs, step) in self.requests.items():
            token = following(prompt, outputs, step)
            kept = logits[row, token].clone()
            logits[row] = float("-inf")
            logits[row, token] = kept
        return logits


class CountsItsCalls(vllms.AdapterLogitsProcessor):
    """A request's: it keeps a state from token to token, which only calls for this request change."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        first = (params.extra_args or {}).get("count_from")
        if first is None:
            return None
        calls = iter(range(first, 256))

        def count(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(logits, float("-inf"))
            only[next(calls)] = 0.0
            return only

        return count


class Brittle(vllms.AdapterLogitsProcessor):
    """A request's: it raises, or returns nonsense, when the request has so many tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        end = (params.extra_args or {}).get("end")
        if end is None:
            return None
        if end == "at once":
            raise KeyError("no state for it")

        def fail(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits if len(output_ids) < end else logits[: len(output_ids)] @ logits

        return fail


class Warmer(vllms.LogitsProcessor):
    """It adds one to what is divided by the temperature, since it changes no order."""

    def __init__(self, *_: Any):
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    arguments = {
        **SMALL,
        "max_model_len": 144,
        "block_size": 16,
        "num_gpu_blocks_override": 12,
        "logprobs_mode": "processed_logits",
        "max_logprobs": -1,
    }
    processors = [Follower, CountsItsCalls, Brittle, Warmer, LogitsProcessor(_bonus, extra_args={"bonus": 0.0})]
    with LLM(tiny_model, **arguments, logits_processors=processors) as llm:
        yield llm


def _bonus(logits: Any, state: Any) -> Any:
    return logits.at[:, 65].add(state.extra_args["bonus"])


def generate(llm: LLM, prompts: list[Any], params: Any, **options: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_they_see_the_requests_own_tokens(llm: LLM):
    """In chunks, beside others, behind prefix hits and after preemptions; greedy and random ones."""
    prompts = [[7], PROMPT, PROMPT + [1, 2], list(range(60, 130)), [3] * 33, PROMPT]
    params = [
        SamplingParams(temperature=float(i % 2), max_tokens=25, ignore_eos=True, extra_args={"steps": [i]})
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [followed(prompt, 25, i) for i, prompt in enumerate(prompts)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert any(output.metrics.num_preemptions for output in outputs)


def test_a_state_is_of_one_request(llm: LLM):
    def counting(first: int, n: int = 1) -> SamplingParams:
        return SamplingParams(n=n, max_tokens=9, ignore_eos=True, extra_args={"count_from": first})

    found = generate(llm, [[1], [2], [3], [4]], [counting(first) for first in (10, 50, 90, 130)])
    assert found == [list(range(first, first + 9)) for first in (10, 50, 90, 130)]
    (output,) = llm.generate([[5]], counting(20, n=3), use_tqdm=False)
    assert [list(each.token_ids) for each in output.outputs] == [list(range(20, 29))] * 3


def test_others_stay_as_they_are_and_jax_functions_run_beside_them(llm: LLM):
    def logit(token: int, temperature: float = 0, **extra_args: Any) -> float:
        params = SamplingParams(temperature=temperature, max_tokens=1, logprobs=-1, extra_args=extra_args)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        return (output.outputs[0].logprobs or [{}])[0][token].logprob

    plain = logit(65) - 1
    assert logit(65, bonus=60.0) == pytest.approx(plain + 61, abs=1e-4)
    # what keeps the order sees logits that are divided by the temperature
    assert logit(65, 0.5) == pytest.approx(plain / 0.5 + 1, abs=1e-4)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"steps": 3}, "steps 3 is no list"),
        ({"steps": "unknown"}, "The logits processor Follower failed: KeyError: 'no such steps'"),
        ({"bonus": "much"}, r"extra_args\['bonus'\] must be a number"),
        ({"vllm's request": 1}, "which no logits processor declares"),
    ],
)
def test_a_request_that_they_refuse_fails_alone(llm: LLM, extra_args: dict[str, Any], words: str):
    params = [SamplingParams(max_tokens=3, temperature=0, extra_args=given) for given in ({"steps": [2]}, extra_args)]
    good, bad = llm.generate([PROMPT, PROMPT], params, use_tqdm=False, on_error="return")
    assert list(good.outputs[0].token_ids) == followed(PROMPT, 3, 2)
    with pytest.raises(ValidationError, match=words):
        raise ValidationError(bad.error)


def test_one_that_raises_ends_its_own_request_alone(llm: LLM):
    """While the others go on in the same steps, and requests that come later have objects of their own."""
    ends = [3, None, "at once", 0, None, 20]
    params = [
        SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, extra_args={"steps": [i], "end": end})
        for i, end in enumerate(ends)
    ]
    for _ in range(2):
        outputs = llm.generate([PROMPT] * 6, params, use_tqdm=False, on_error="return")
        for i, (end, output) in enumerate(zip(ends, outputs, strict=True)):
            count = 25 if end is None else 0 if end == "at once" else int(end)
            assert list(output.outputs[0].token_ids) == followed(PROMPT, count, i)
            assert output.outputs[0].finish_reason == ("length" if end is None else "error")
            assert (output.error is None) == (end is None)
    assert str(outputs[2].error) == "The logits processor Brittle failed: KeyError: 'no state for it'"
    assert str(outputs[0].error).startswith("The logits processor Brittle failed: RuntimeError: ")
    with pytest.raises(Exception, match="The logits processor Brittle failed: RuntimeError"):
        llm.generate([PROMPT], params[0], use_tqdm=False)


class Lowers(vllms.AdapterLogitsProcessor):
    """A request's: its last three tokens are made less likely."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        def lower(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            for token in output_ids[-3:]:
                logits[token] -= (params.extra_args or {})["by"]
            return logits

        return lower


def lowers(logits: Any, state: Any) -> Any:
    """The same in JAX."""
    for back in (1, 2, 3):
        place = state.length - back
        token = jnp.take_along_axis(state.tokens, jnp.maximum(place, 0)[:, None], axis=1)[:, 0]
        by = jnp.where(place >= state.prompt_length, state.extra_args["by"], 0.0)
        logits = logits.at[jnp.arange(len(logits)), token].add(-by)
    return logits


@pytest.mark.thorough
def test_beside_adapters_grammars_preemption_and_several_decode_steps(tiny_model: Path, tmp_path: Path):
    """A class for torch does what the same function in JAX does."""
    adapters = [
        LoRARequest(name, number, save_adapter(tiny_model, tmp_path / name, seed=number, **config))
        for number, (name, config) in enumerate(ADAPTERS.items(), 1)
    ]
    prompts = [f"some text {i} " * (1 + i % 3) for i in range(8)] * 2
    given = [[None, *adapters][i % 4] for i in range(16)]
    params = [
        SamplingParams(
            temperature=1.1 * (i % 2),
            seed=i % 8,
            max_tokens=15,
            extra_args={"by": 3.0 * (i < 8)},
            structured_outputs={"regex": "(ab|cd|fg){2,9}"} if i % 8 % 3 == 2 else None,
        )
        for i in range(16)
    ]

    def answers(processor: Any, **arguments: Any) -> list[list[int]]:
        arguments = {**SMALL, "max_model_len": 96, "block_size": 8, "enable_lora": True, "max_loras": 2, **arguments}
        with LLM(tiny_model, **arguments, logits_processors=[processor]) as llm:
            return generate(llm, prompts, params, lora_request=given)

    expected = answers(LogitsProcessor(lowers, extra_args={"by": 0.0}))
    assert sum(lowered != plain for lowered, plain in zip(expected[:8], expected[8:], strict=True)) >= 4
    steps = {"num_decode_steps": 3, "enforce_eager": False, "max_num_batched_tokens": 8, "max_num_seqs": 2}
    for arguments in (steps, {"num_gpu_blocks_override": 20, "kv_offloading_size": "2MB", "async_scheduling": True}):
        assert answers(Lowers, **arguments) == expected, arguments


class Starts(Follower):
    def __init__(self, *_: Any):
        raise RuntimeError("it has no licence")


class OfTheNewRunner:
    """vLLM's second form, which has no update_state."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


def test_what_cannot_run_is_refused_at_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="it has no licence"):
        LLM(tiny_model, **SMALL, logits_processors=[Starts])
    with pytest.raises(ValidationError, match="without the methods apply and update_state"):
        LLM(tiny_model, **SMALL, logits_processors=[OfTheNewRunner])
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    with pytest.raises(ValidationError, match="Leave speculative_config out, or write Follower as a jax function"):
        LLM(tiny_model, **{**SMALL, "enforce_eager": False}, logits_processors=[Follower], speculative_config=drafts)
    with pytest.raises(ValidationError, match="tensor_parallel_size=2 with the logits processor Follower"):
        LLM(tiny_model, **SMALL, logits_processors=[Follower], tensor_parallel_size=2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValidationError, match="torch cannot be imported .*: pip install torch, or write it as a jax"):
        LLM(tiny_model, **SMALL, logits_processors=[f"{__name__}:Follower"])


def test_engines_of_the_same_arguments_have_their_own_requests():
    """`EngineArgs` has the class once, and two engines may run at the same time."""
    host = HostProcessor(Follower)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 257))
    host.start(config)
    keys = [RowRequests([host]).admit(0, SamplingParams(extra_args={"steps": [step]})) for step in (1, 2)]
    tokens, ones = np.array([PROMPT, PROMPT]), np.ones(2, np.float32)
    lengths = np.full(2, len(PROMPT))
    logits = host(np.zeros((2, 257), np.float32), tokens, lengths, lengths, ones, np.array(keys, np.float32))
    assert logits.argmax(1).tolist() == [following(PROMPT, [], step) for step in (1, 2)]


def test_updates_of_a_batch_are_kept():
    """Removed ones first, then added, then moved, as vLLM's documentation has it."""
    states: dict[int, str] = {0: "a", 1: "b", 2: "c"}

    def state(params: Any, prompt: Any, outputs: list[int]) -> str | None:
        return params

    def update(removed: Any = (), added: Any = (), moved: Any = ()) -> bool:
        named: Any = tuple((index, params, None, []) for index, params in added)
        batch = BatchUpdate(batch_size=3, removed=removed, added=named, moved=moved)
        return process_dict_updates(states, batch, state)

    assert not process_dict_updates(states, None, state)
    assert update(removed=[1], added=[(3, "d"), (0, None)]) and states == {2: "c", 3: "d"}
    assert update(moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]) and states == {0: "c", 3: "d"}
    assert update(moved=[(0, 3, MoveDirectionality.SWAP)]) and states == {0: "d", 3: "c"}
    assert not update()
