"""A smaller model drafts: what comes out is the large one's, and the small one knows what the large one has read."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.drafts import checks_that_cost
from support.latent_cache import DEEPSEEK, write_random
from support.tiny_model import CONFIG

from jaxllm import LLM, AsyncLLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.speculative.reading import ReadingCosts

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 8,
}
#: of a draft that has other layers, heads and windows than its model
OTHER: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "use_sliding_window": True,
    "sliding_window": 24,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
LENGTHS = (1, 2, 5, 6, 70, 40, 57, 60)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def twin(tiny_model: Path) -> Iterator[LLM]:
    """Its draft is the model itself; with a pool that does not hold two long requests."""
    drafts = {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": 3}
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=18, speculative_config=drafts) as llm:
        # whatever is drafted is checked
        with checks_that_cost(llm, 0.0):
            yield llm


def counted(llm: LLM) -> tuple[int, int]:
    """(drafted, accepted) tokens since the start."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (5, 7, 8, 30, 50, 3, 17, 64)]


def compare(plain: LLM, drafting: LLM, asked: Any, params: Any) -> None:
    wanted, got = (llm.generate(asked, params, use_tqdm=False) for llm in (plain, drafting))
    assert [one.outputs[0].token_ids for one in got] == [one.outputs[0].token_ids for one in wanted]
    assert drafting.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_twin_is_always_right(plain: LLM, twin: LLM, sampling: dict[str, Any]):
    """One wrong key or value of the draft's own cache would make a draft wrong: behind chunks of prompts, hits of the
    prefix cache, preemptions, steps without drafts, and lots of which all were right. Sampled tokens are drawn with the
    random numbers that drafts are drawn with.
    """
    params = [SamplingParams(**sampling, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    drafted, accepted = counted(twin)
    for _ in range(2):
        compare(plain, twin, prompts(), params)
    now = counted(twin)
    assert now[0] - drafted == now[1] - accepted > 150
    assert sum(metric.value for metric in twin.get_metrics() if metric.name == "vllm:num_preemptions")  # pyright: ignore


def test_restricted_requests_have_the_hosts_drafts(plain: LLM, twin: LLM):
    """The draft reads later what they bring, alone and beside others, and drafts for their prefix as for any other."""
    params = [
        SamplingParams(**GREEDY, max_tokens=30, structured_outputs={"regex": "(abc|def){9,19}"}),
        SamplingParams(**GREEDY, max_tokens=40, ignore_eos=True),
    ]
    asked = prompts()[3:5]
    compare(plain, twin, asked, params)
    compare(plain, twin, asked[0], params[0])
    (first,) = twin.generate(asked[0], params[0], use_tqdm=False)
    assert first.metrics is not None and first.metrics.num_accepted_tokens > 5
    drafted, accepted = counted(twin)
    # the last tokens nobody has read
    compare(plain, twin, [[*asked[0], *first.outputs[0].token_ids[:-10], 7]], params[1])
    now = counted(twin)
    assert now[0] - drafted == now[1] - accepted > 20


def test_what_was_passed_over_is_read_later(plain: LLM, twin: LLM):
    """While checks cost more than anybody can pay, the draft rests; then it is right again, in launches with drafts and
    behind steps in which another request begins.
    """
    asked, late = prompts()[3:5]
    params = SamplingParams(**GREEDY, max_tokens=60, ignore_eos=True)
    wanted = [one.outputs[0].token_ids for one in plain.generate([asked, late], params, use_tqdm=False)]
    twin.reset_prefix_cache()
    engine, found = twin.llm_engine, dict[str, Any]()
    runner: Any = twin.engine.core.cores[0]._runner  # pyright: ignore
    drafted, accepted = counted(twin)
    passed_over: set[int] = set()

    def steps(count: int) -> None:
        for _ in range(count):
            found.update({output.request_id: output for output in engine.step()})
            passed_over.add(int(np.asarray(runner._state.drafting)[:-1, -1].max()))

    with checks_that_cost(twin, 100.0):
        engine.add_request("asked", {"prompt_token_ids": asked}, params)
        steps(20)
        assert max(passed_over) > 1
        engine.add_request("late", {"prompt_token_ids": late}, params)
        steps(16)
    assert counted(twin) == (drafted, accepted)
    with checks_that_cost(twin, 0.0):
        while engine.has_unfinished_requests():
            steps(1)
    assert [found[name].outputs[0].token_ids for name in ("asked", "late")] == wanted
    now = counted(twin)
    assert now[0] - drafted == now[1] - accepted > 30


def test_a_prompt_that_is_not_read_costs_the_others_no_drafts(plain: LLM, twin: LLM):
    """A long prompt before a single token is not read, beside a request that is drafted for, nor are its later chunks;
    behind it a short one is. What the first one got meanwhile is read before that one's prompt.
    """
    asked = [prompts()[2], prompts()[3][:24], prompts()[0][:4]]
    params = [SamplingParams(**GREEDY, max_tokens=n, ignore_eos=True) for n in (60, 1, 30)]
    wanted = [one.outputs[0].token_ids for one in plain.generate(asked, params, use_tqdm=False)]
    twin.reset_prefix_cache()
    engine, core = twin.llm_engine, twin.engine.core.cores[0]
    head: Any = core._runner.head  # pyright: ignore
    turns: Any = core.scheduler._decode_steps._apart_credit  # pyright: ignore
    found, passed_over, before, costs = dict[str, Any](), set[int](), counted(twin), head._reading._costs
    head._learns, head._clock.seconds = True, lambda launch, waited: None
    head._reading._costs = ReadingCosts(step=0.05, late_token=0.0, tokens_of_a_step=1)
    head._credit.win(1e9)
    # those who decode take part in the prompts' steps
    turns.pay(1e9)
    try:
        engine.add_request("0", {"prompt_token_ids": asked[0]}, params[0])
        while counted(twin) == before:
            found.update({output.request_id: output for output in engine.step()})
        for name in (1, 2):
            engine.add_request(str(name), {"prompt_token_ids": asked[name]}, params[name])
        while engine.has_unfinished_requests():
            found.update({output.request_id: output for output in engine.step()})
            passed_over |= {one.passed_over for one in head._reading._rows.values()}
    finally:
        head._learns, head._reading._costs = False, costs
        del head._clock.seconds
        turns.win(2e9)
    assert [found[name].outputs[0].token_ids for name in "012"] == wanted
    assert max(passed_over) > 1
    assert [found[name].metrics.num_drafted_tokens > 10 for name in "012"] == [True, False, True]
    assert found["1"].metrics.num_drafted_tokens == 0
    now = counted(twin)
    assert now[0] - before[0] == now[1] - before[1] > 30


@pytest.mark.thorough
def test_it_does_not_read_what_it_is_not_to_draft_for(tiny_model: Path, plain: LLM):
    """Neither where more requests run than may have drafts, nor where drafts have won too little; who comes then is
    drafted for as before.
    """
    drafts = {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": 3}
    arguments = {**ARGUMENTS, "max_num_seqs": 4, "num_gpu_blocks_override": 40, "enable_prefix_caching": False}
    params = SamplingParams(**GREEDY, max_tokens=40, ignore_eos=True)
    with LLM(tiny_model, **arguments, speculative_config=drafts) as llm, checks_that_cost(llm, 0.0):
        head: Any = llm.engine.core.cores[0]._runner.head  # pyright: ignore
        # of a much smaller one
        head._reading._costs = ReadingCosts(step=0.001, late_token=0.0, tokens_of_a_step=16)
        compare(plain, llm, prompts()[:4], params)
        # the last of them run alone, with tokens that it has not read
        assert counted(llm) == (0, 0)
        compare(plain, llm, prompts()[:2], params)
        drafted, accepted = counted(llm)
        assert drafted == accepted > 20
        head._learns = True
        head._credit.pay(1000.0)
        compare(plain, llm, prompts()[2:4], params)
        assert counted(llm) == (drafted, accepted)
        head._credit.win(2000.0)
        compare(plain, llm, prompts()[2:4], params)
        now = counted(llm)
        assert now[0] - drafted == now[1] - accepted > 0


def test_weights_are_the_models_own(plain: LLM, twin: LLM):
    """What users see and replace has nothing of the draft, which stays."""
    (params,) = twin.apply_model(lambda params: params)
    assert params.draft is None
    changed = dataclasses.replace(params, norm=params.norm * np.float32(0.9))
    drafted, accepted = counted(twin)
    long = SamplingParams(**SAMPLED, max_tokens=60, ignore_eos=True)
    try:
        for llm in (plain, twin):
            llm.update_weights(changed)
        compare(plain, twin, prompts()[:2], long)
        now = counted(twin)
        assert now[0] - drafted > now[1] - accepted > 0
        twin.sleep(level=1)
        twin.wake_up()
        compare(plain, twin, prompts()[:2], long)
    finally:
        for llm in (plain, twin):
            llm.update_weights(params)
    drafted, accepted = counted(twin)
    compare(plain, twin, prompts()[:2], long)
    now = counted(twin)
    assert now[0] - drafted == now[1] - accepted


def write_other(folder: Path) -> Path:
    """A Qwen3 with random weights, without a tokenizer."""
    random = np.random.default_rng(1)
    d, f, q, kv = 48, CONFIG["intermediate_size"], 3 * 32, 32
    shapes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (32,),
        "self_attn.k_norm": (32,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {f"model.layers.{layer}.{name}.weight": shape for layer in range(3) for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (CONFIG["vocab_size"], d), "model.norm.weight": (d,)}
    weights = {name: random.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **OTHER}))
    return folder


@pytest.mark.thorough
def test_a_draft_of_another_form(tiny_model: Path, plain: LLM, tmp_path: Path):
    """Other heads, layers that see less, a shorter context: it is mostly wrong, and nobody sees it."""
    drafts = {
        "method": "draft_model",
        "model": str(write_other(tmp_path)),
        "num_speculative_tokens": 3,
        "max_model_len": 60,
    }
    # few tokens are likely, so that drafts are right now and then
    likely: dict[str, Any] = {**SAMPLED, "logit_bias": dict.fromkeys(range(60, 64), 40.0)}
    params = [SamplingParams(**likely, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    with (
        LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=18, speculative_config=drafts) as llm,
        checks_that_cost(llm, 0.0),
    ):
        compare(plain, llm, prompts(), params)
        drafted, accepted = counted(llm)
        assert drafted > accepted > 0
        # nothing is drafted behind the draft's own longest sequence
        compare(plain, llm, prompts()[-1], params[-1])
        assert counted(llm)[0] == drafted


@pytest.mark.thorough
def test_streams_of_a_twin_beside_memory_that_is_saved(tiny_model: Path):
    """By tasks of an event loop, with stop strings, several answers to a prompt, and preemptions; weights are on the
    host, keys and values in int8.
    """
    arguments = {**ARGUMENTS, "cpu_offload_gb": 1, "kv_cache_dtype": "int8", "num_gpu_blocks_override": 18}
    kinds: list[dict[str, Any]] = [
        GREEDY,
        {**SAMPLED, "n": 2},
        {**SAMPLED, "stop": [*"abcdefgh"], "temperature": 2.0},
    ]
    params = [SamplingParams(**kind, max_tokens=60, ignore_eos=True) for kind in kinds]
    asked = [(ids, one) for ids in prompts()[:5] for one in params]
    with LLM(tiny_model, **{**arguments, "num_gpu_blocks_override": 129}, enforce_eager=True) as llm:
        ids, wanted_of = [{"prompt_token_ids": ids} for ids, _ in asked], [one for _, one in asked]
        outputs = llm.generate(ids, wanted_of, use_tqdm=False)
        wanted = [[(list(one.token_ids), one.text, one.stop_reason) for one in output.outputs] for output in outputs]

    async def one(llm: AsyncLLM, name: str, ids: list[int], params: SamplingParams) -> list[Any]:
        got: dict[int, list[Any]] = {}
        params = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
        async for output in llm.generate({"prompt_token_ids": ids}, params, request_id=name):
            for part in output.outputs:
                before = got.setdefault(part.index, [[], "", None])
                before[0].extend(part.token_ids)
                got[part.index] = [before[0], before[1] + part.text, part.stop_reason]
        return [tuple(got[index]) for index in sorted(got)]

    async def all_of_them() -> tuple[list[Any], Any]:
        drafts = {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": 3}
        llm = await AsyncLLM.start(tiny_model, **arguments, speculative_config=drafts)
        try:
            with checks_that_cost(llm.llm, 0.0):
                got = await asyncio.gather(*(one(llm, str(i), *each) for i, each in enumerate(asked)))
            return got, counted(llm.llm)
        finally:
            llm.shutdown()

    got, (drafted, accepted) = asyncio.run(all_of_them())
    assert got == wanted
    assert drafted >= accepted > 100
    assert any(reason for answers in wanted for _, _, reason in answers)


@pytest.mark.thorough
def test_a_twin_with_latents_is_always_right(tmp_path: Path):
    """Latents in the draft's own cache, and experts, which read them in lots, in chunks and one by one."""
    model = write_random(tmp_path, DEEPSEEK)
    drafts = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    params = [SamplingParams(**SAMPLED, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    with (
        LLM(model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as alone,
        LLM(model, **ARGUMENTS, num_gpu_blocks_override=18, speculative_config=drafts) as llm,
    ):
        with checks_that_cost(llm, 0.0):
            compare(alone, llm, prompts(), params)
        drafted, accepted = counted(llm)
        assert drafted == accepted > 100
        # while it rests it passes over tokens, and reads them later
        with checks_that_cost(llm, 1.4):
            compare(alone, llm, prompts(), params)
        drafted, accepted = counted(llm)
        assert drafted == accepted


def test_what_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    drafts = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    with pytest.raises(ValidationError, match="vocabulary of 300 tokens, and the model has 257"):
        LLM(tiny_model, **ARGUMENTS, skip_tokenizer_init=True, speculative_config=drafts)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["NobodysModel"]}))
    with pytest.raises(ValidationError, match=r"speculative_config\.model=.*NobodysModel"):
        LLM(tiny_model, **ARGUMENTS, skip_tokenizer_init=True, speculative_config=drafts)
