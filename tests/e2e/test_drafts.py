"""Drafts change nothing of what is generated, of why it ends, and of what is cached: only how many steps it takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.drafts import checks_that_cost, compare, counted, generated, repeating, results
from support.tiny_model import EOS

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.speculative.credit import INITIAL

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[LLM]:
    """With a pool that does not hold four long requests."""
    with LLM(tiny_model, **ARGUMENTS, num_gpu_blocks_override=40, speculative_config=NGRAM) as llm:
        # whatever is drafted is checked
        with checks_that_cost(llm, 0.0):
            yield llm


GREEDY: dict[str, Any] = {"temperature": 0.0}
#: tokens of which few are likely, so that drafts are right now and then
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.6, "seed": 5}
PENALISED: dict[str, Any] = {**SAMPLED, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
LIKELY: dict[str, Any] = {"logit_bias": dict.fromkeys(range(60, 64), 40.0)}


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        {**GREEDY, **LIKELY},
        {**SAMPLED, **LIKELY},
        {**PENALISED, **LIKELY},
        {**SAMPLED, "min_p": 0.1, "top_k": 9},
    ],
    ids=["greedy", "greedy, few tokens", "sampled", "penalised", "min_p"],
)
def test_every_way_to_sample(plain: LLM, drafting: LLM, sampling: dict[str, Any]):
    """Lengths of all kinds, more requests than rows, and a pool in which some are preempted."""
    before = counted(drafting, "num_accepted_tokens")
    prompts = [repeating(seed, length) for seed, length in enumerate((5, 7, 8, 30, 50, 3, 17, 64))]
    lengths = (1, 2, 5, 6, 70, 40, 57, 60)
    params = [SamplingParams(**sampling, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = compare(plain, drafting, prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(lengths)
    assert counted(drafting, "num_accepted_tokens") > before


def test_the_end_of_the_context(plain: LLM, drafting: LLM):
    params = SamplingParams(**GREEDY, max_tokens=None, ignore_eos=True)
    for length in (100, 121, 126, 127):
        (output,) = compare(plain, drafting, [repeating(2, length)], params)
        assert len(output.outputs[0].token_ids) == 128 - length


@pytest.mark.parametrize("as_text", [False, True], ids=["stop ids", "stop strings"])
def test_an_end_among_the_drafts(plain: LLM, drafting: LLM, as_text: bool):
    """And what is in the prefix cache afterwards is what was computed: a follow-up hits it and goes on alike."""
    prompt = repeating(3, 13)
    base = SamplingParams(**SAMPLED, **LIKELY, max_tokens=30, ignore_eos=True)
    (whole,) = plain.generate(prompt, base, use_tqdm=False)
    completion = whole.outputs[0]
    params = []
    for end in range(4, 28):
        last = completion.token_ids[end - 3 : end]
        text = completion.text[end - 3 : end]
        stop = {"stop": [text]} if as_text else {"stop_token_ids": [last[-1]]}
        params.append(dataclasses.replace(base, **stop))
    for some in (params[:3], params[7:8], params[20:]):
        before = generated(drafting)
        outputs = compare(plain, drafting, [prompt] * len(some), some)
        assert generated(drafting) - before == sum(len(output.outputs[0].token_ids) for output in outputs)
        assert any(output.outputs[0].finish_reason == "stop" for output in outputs)
    follow_up = [*prompt, *outputs[0].outputs[0].token_ids, 9]
    compare(plain, drafting, [follow_up], dataclasses.replace(base, max_tokens=9))


def test_a_stop_string_that_right_drafts_follow(plain: LLM, drafting: LLM):
    """One token comes again and again, so that every draft is right: the string ends at every place of a step."""
    base: dict[str, Any] = {**GREEDY, "logit_bias": {61: 100.0}, "ignore_eos": True}
    (whole,) = plain.generate(repeating(4, 9), SamplingParams(**base, max_tokens=24), use_tqdm=False)
    text, before = whole.outputs[0].text, generated(drafting)
    assert len(set(text)) == 1 and len(text) == 24
    lengths = range(2, 12)
    for length in lengths:
        params = SamplingParams(**base, max_tokens=24, stop=[text[:length]], logprobs=1)
        (output,) = compare(plain, drafting, [repeating(4, 9)], params)
        assert len(output.outputs[0].token_ids) == len(output.outputs[0].logprobs or []) == length
    # what came behind the string was never generated
    assert generated(drafting) - before == sum(lengths)


def test_what_needs_the_host_between_two_tokens(plain: LLM, drafting: LLM):
    """Beside requests that the device drafts for, and alone."""
    base: dict[str, Any] = {**GREEDY, "max_tokens": 24, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": "(ab|cd){2,9}"}},
        {"min_tokens": 11, "stop_token_ids": list(range(40, 90))},
        {"bad_words": ["a", "bc"]},
        {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3}},
        {"n": 2, "temperature": 0.8, "seed": 4, "top_p": 0.5},
        {"stop_token_ids": list(range(100, 120))},
    ]
    params = [SamplingParams(**{**base, **kind}) for kind in kinds]
    outputs = compare(plain, drafting, [repeating(seed, 20) for seed in range(len(params))], params)
    assert re.fullmatch("(ab|cd)*[ac]?", outputs[0].outputs[0].text)
    for seed, one in enumerate(params):
        compare(plain, drafting, [repeating(seed, 20)], one)


#: texts of which much follows from the rest; a byte is a token
COUNTED_OUT: list[dict[str, Any]] = [
    {"regex": "(abcdefgh|ijklmnop){4}"},
    {"regex": "(ab|cd|fg){2,19}"},
    {"choice": ["the first of them", "the first of all", "another"]},
    {"grammar": 'start: "x" ("yyyyy" | "zzzzz")+ "end"'},
    {"json": {"type": "object", "properties": {"a": {"enum": ["right", "ready"]}}, "required": ["a"]}},
]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("eos", [True, False], ids=["eos", "ignore_eos"])
def test_grammars_have_drafts(plain: LLM, drafting: LLM, sampling: dict[str, Any], eos: bool):
    """Alone and together: what the grammar leaves no choice for, and what stood there before where it is allowed."""
    params = [
        SamplingParams(**sampling, ignore_eos=not eos, structured_outputs=one, max_tokens=45, logprobs=1)
        for one in COUNTED_OUT
    ]
    prompts = [repeating(seed, 20) for seed in range(len(params))]
    compare(plain, drafting, prompts, params)
    alone = [compare(plain, drafting, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    for output in alone:
        assert output.metrics is not None
        assert output.metrics.num_accepted_tokens > 0
        assert len(output.outputs[0].logprobs or []) == len(output.outputs[0].token_ids)
    steps = alone[0].metrics
    assert steps is not None and steps.num_accepted_tokens > 15


def test_a_grammar_and_what_else_restricts(plain: LLM, drafting: LLM):
    kinds: list[dict[str, Any]] = [
        {"min_tokens": 25, "stop_token_ids": [64], "logit_bias": {64: 3.0}},
        {"min_tokens": 25, "stop_token_ids": list(range(110, 130))},
        {"bad_words": ["fgf"]},
        {"allowed_token_ids": [64, 65, 69, 70, EOS]},
        {"stop": ["abf"]},
        {"logit_bias": {66: 5.0}, "frequency_penalty": 0.3},
    ]
    params = [SamplingParams(**SAMPLED, structured_outputs=COUNTED_OUT[1], max_tokens=35, **kind) for kind in kinds]
    outputs = compare(plain, drafting, [repeating(seed, 20) for seed in range(len(params))], params)
    assert any(output.metrics and output.metrics.num_accepted_tokens for output in outputs)
    # the grammar is at its end, which must not come yet
    nothing = SamplingParams(**GREEDY, structured_outputs=COUNTED_OUT[0], min_tokens=40, max_tokens=45)
    for llm in (plain, drafting):
        with pytest.raises(ValidationError, match="leaves no token to generate"):
            llm.generate(repeating(1, 20), nothing, use_tqdm=False)


def test_who_is_beside_a_grammar_has_drafts(plain: LLM, drafting: LLM):
    """One token comes again and again, so that every draft is right."""
    others = SamplingParams(**GREEDY, logit_bias={61: 100.0}, max_tokens=60, ignore_eos=True)
    restricted = SamplingParams(**SAMPLED, structured_outputs={"regex": "[a-z0-9]{60}"}, max_tokens=60)
    one, other = compare(plain, drafting, [repeating(4, 9), repeating(5, 9)], [others, restricted])
    assert one.metrics is not None and other.metrics is not None
    assert one.metrics.num_accepted_tokens > 30


@pytest.mark.parametrize("least", [20, 29])
def test_drafts_before_min_tokens(plain: LLM, drafting: LLM, least: int):
    """The likely tokens, of which the prompt is made and so are drafts, end a request, and do not before that."""
    base: dict[str, Any] = {**SAMPLED, **LIKELY, "max_tokens": 60}
    params = [
        SamplingParams(**base, min_tokens=least, stop_token_ids=[61, 63]),
        SamplingParams(**base, min_tokens=least, stop_token_ids=[60, 61, 62, 63], ignore_eos=True),
        SamplingParams(**base, min_tokens=60, stop_token_ids=[60], allowed_token_ids=[60, 61, 62]),
    ]
    prompts = [[60 + (token & 3) for token in repeating(seed, 20)] for seed in range(3)]
    outputs = compare(plain, drafting, prompts, params)
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "stop", "length"]
    assert all(output.metrics and output.metrics.num_accepted_tokens for output in outputs[::2])
    assert all(len(output.outputs[0].token_ids) > least for output in outputs)


@pytest.mark.parametrize("sampling", [{**GREEDY, **LIKELY}, {**PENALISED, **LIKELY}], ids=["greedy", "penalised"])
def test_log_probabilities_are_the_models(plain: LLM, drafting: LLM, sampling: dict[str, Any]):
    before = counted(drafting, "num_accepted_tokens")
    base: dict[str, Any] = {**sampling, "max_tokens": 30, "ignore_eos": True}
    params = [SamplingParams(**base, logprobs=3), SamplingParams(**base, logprob_token_ids=[5, 61])]
    prompts = [repeating(6, 30), repeating(7, 21)]
    wanted = plain.generate(prompts, params, use_tqdm=False)
    got = compare(plain, drafting, prompts, params)
    assert counted(drafting, "num_accepted_tokens") > before
    for one, other in zip(got, wanted, strict=True):
        mine, theirs = one.outputs[0].logprobs, other.outputs[0].logprobs
        assert mine is not None and theirs is not None and len(mine) == len(theirs) == 30
        for entry, expected in zip(mine, theirs, strict=True):
            assert entry is not None and expected is not None and entry.keys() == expected.keys()
            for token_id, found in entry.items():
                assert found.logprob == pytest.approx(expected[token_id].logprob, abs=1e-4)
                assert (found.rank, found.decoded_token) == (expected[token_id].rank, expected[token_id].decoded_token)


def test_a_stream_brings_what_a_step_brings(plain: LLM, drafting: LLM):
    params = SamplingParams(**GREEDY, **LIKELY, max_tokens=40, ignore_eos=True)
    prompt = repeating(8, 20)
    (whole,) = plain.generate(prompt, params, use_tqdm=False)
    drafting.reset_prefix_cache()
    with drafting.trace() as trace:
        drafting.generate(prompt, params, use_tqdm=False)
    assert sum(step.num_prefill_tokens for step in trace.steps) == len(prompt)
    assert len(trace.steps) < 40
    steps, (request,) = trace.arrays(), trace.requests
    assert (
        steps["num_decode_tokens"].sum() == 39 and (steps["num_accepted_tokens"] <= steps["num_drafted_tokens"]).all()
    )
    drafted, accepted = (int(steps[name].sum()) for name in ("num_drafted_tokens", "num_accepted_tokens"))
    assert (request.num_drafted_tokens, request.num_accepted_tokens) == (drafted, accepted) and accepted > 0
    assert f"{accepted} of {drafted} drafts right" in repr(trace)
    drafting.reset_prefix_cache()
    streamed = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
    drafting.llm_engine.add_request("one", {"prompt_token_ids": prompt}, streamed)
    lots: list[list[int]] = []
    while drafting.llm_engine.has_unfinished_requests():
        lots += [list(output.outputs[0].token_ids) for output in drafting.llm_engine.step()]
    assert [token for lot in lots for token in lot] == list(whole.outputs[0].token_ids)
    assert max(map(len, lots)) > 1


def test_drafts_beside_prompts(plain: LLM, drafting: LLM):
    """Those that decode have drafts between the chunks of a prompt, and get what they get alone."""
    right = SamplingParams(**GREEDY, logit_bias={61: 100.0}, max_tokens=100, ignore_eos=True)
    late = SamplingParams(**GREEDY, max_tokens=4, ignore_eos=True)
    first, other = repeating(4, 9), repeating(5, 90)
    wanted = plain.generate([first, other], [right, late], use_tqdm=False)
    drafting.reset_prefix_cache()
    engine, found = drafting.llm_engine, {}
    turns: Any = drafting.engine.core.cores[0].scheduler._decode_steps._apart_credit  # pyright: ignore
    # whatever tests before have left
    turns.win(INITIAL)
    with drafting.trace() as trace:
        engine.add_request("first", {"prompt_token_ids": first}, right)
        for _ in range(4):
            engine.step()
        engine.add_request("other", {"prompt_token_ids": other}, late)
        while engine.has_unfinished_requests():
            found |= {output.request_id: output for output in engine.step() if output.finished}
    assert results([found["first"], found["other"]]) == results(wanted)
    steps = trace.arrays()
    (chunks,) = (steps["num_prefill_tokens"] > 0).nonzero()
    between = steps["num_accepted_tokens"][chunks[1] : chunks[-1]]
    # six chunks of 16 tokens, with a step between each two of them, unless the host was late for one
    assert (between > 0).sum() >= 3


def test_drafts_are_counted(drafting: LLM):
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    before = [counted(drafting, name) for name in names]
    params = SamplingParams(**GREEDY, **LIKELY, max_tokens=40, ignore_eos=True)
    (output,) = drafting.generate([repeating(1, 30)], params, use_tqdm=False)
    drafts, drafted, accepted = (counted(drafting, name) - old for name, old in zip(names[:3], before, strict=False))
    by_place = [new - old for new, old in zip(counted(drafting, names[3]), before[3], strict=True)]
    assert len(by_place) == 3 and sum(by_place) == accepted
    assert 0 < accepted <= drafted <= 3 * drafts and by_place == sorted(by_place, reverse=True)
    assert output.metrics is not None
    assert (output.metrics.num_drafted_tokens, output.metrics.num_accepted_tokens) == (drafted, accepted)


WRONG: dict[str, Any] = {"temperature": 1.0, "seed": 2, "allowed_token_ids": list(range(60, 72))}
"""Any of twelve tokens: most of what follows an earlier one is wrong."""


def test_wrong_drafts_are_soon_given_up(plain: LLM, drafting: LLM):
    params = SamplingParams(**WRONG, max_tokens=100, ignore_eos=True)
    prompts = [repeating(seed, 20) for seed in (9, 10)]
    with checks_that_cost(drafting, 0.4):
        (alone,) = compare(plain, drafting, prompts[:1], params)
        beside = compare(plain, drafting, prompts, params)
    assert alone.metrics is not None
    # a step and a half at first, and an eightieth of each later one, of which a try takes four tenths
    assert 0 < alone.metrics.num_drafted_tokens < 12
    assert all(output.metrics and output.metrics.num_drafted_tokens < 12 for output in beside)
    (free,) = compare(plain, drafting, prompts[:1], params)
    assert free.metrics is not None and free.metrics.num_drafted_tokens > 100


def test_right_drafts_become_as_long_as_they_may(plain: LLM, drafting: LLM):
    """Beside a request whose drafts are wrong, too, and after one in the same row."""
    right = SamplingParams(**GREEDY, logit_bias={61: 100.0}, max_tokens=100, ignore_eos=True)
    wrong = SamplingParams(**WRONG, max_tokens=100, ignore_eos=True)
    with checks_that_cost(drafting, 0.4):
        compare(plain, drafting, [repeating(9, 20)], wrong)
        (alone,) = compare(plain, drafting, [repeating(4, 9)], right)
        one, other = compare(plain, drafting, [repeating(4, 9), repeating(9, 20)], [right, wrong])
    assert alone.metrics is not None and one.metrics is not None and other.metrics is not None
    # 100 tokens are 25 steps of 4
    assert alone.metrics.num_accepted_tokens > 68
    assert one.metrics.num_accepted_tokens > 50 > 30 > other.metrics.num_drafted_tokens


def slowed(logits: jax.Array, state: Any) -> jax.Array:
    """The same after some milliseconds of work."""
    square = jnp.full((256, 256), jnp.isnan(logits[0, 0]), logits.dtype)
    return logits + lax.fori_loop(0, 10, lambda _, last: jnp.tanh(last @ square), square)[0, 0]


@pytest.mark.thorough
def test_what_checks_cost_is_learned_from_launches(tiny_model: Path):
    """Launches that the host came late for teach nothing, so they are slow ones."""
    arguments = {**ARGUMENTS, "max_num_seqs": 1, "logits_processors": [slowed]}
    right = SamplingParams(**GREEDY, logit_bias={61: 100.0}, max_tokens=100, ignore_eos=True)
    with LLM(tiny_model, **arguments, num_gpu_blocks_override=40, speculative_config=NGRAM) as llm:
        head: Any = llm.engine.core.cores[0]._runner.head  # pyright: ignore
        before = head.programs.check_costs[1].copy()
        for _ in range(20):
            llm.generate([repeating(4, 9)], right, use_tqdm=False)
            if (head.programs.check_costs[1] != before).any():
                break
        assert (head.programs.check_costs[1] != before).any()


def test_an_aborted_request_frees_what_it_holds(drafting: LLM):
    prompts = [{"prompt_token_ids": repeating(seed, 20)} for seed in range(3)]
    for index, prompt in enumerate(prompts):
        drafting.llm_engine.add_request(str(index), prompt, SamplingParams(**GREEDY, max_tokens=60, ignore_eos=True))
    for _ in range(8):
        drafting.llm_engine.step()
    drafting.llm_engine.abort_request(["0", "2"])
    while drafting.llm_engine.has_unfinished_requests():
        drafting.llm_engine.step()
    assert drafting.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 with speculative_config"),
        ({"max_num_batched_tokens": 7}, "num_speculative_tokens=3 needs max_num_batched_tokens of at least 8"),
        ({"runner": "pooling", "convert": "embed"}, "a pooling engine samples nothing"),
    ],
)
def test_what_does_not_go_together(tiny_model: Path, arguments: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        LLM(tiny_model, **{**ARGUMENTS, "speculative_config": NGRAM, **arguments})
