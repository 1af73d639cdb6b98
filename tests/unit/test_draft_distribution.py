"""What the compiled check of drafts brings is distributed by the formula: tokens up to the first that is no draft."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.quick_compile import THOROUGH
from support.sampling_oracle import Row, adjusted, probabilities

from jaxllm import LogitsProcessor, SamplingParams
from jaxllm.config.cache import kv_cache_groups
from jaxllm.engine.step import AdmittedRequest, SchedulerOutput
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import shapes
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.heads.draft_steps import DraftParams
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_rows import SamplingRows
from jaxllm.runner.heads.sampling_step import DRAFTING_COLUMNS, State, StepConfig
from jaxllm.runner.rows import Rows
from jaxllm.sampling.processors import LogitsState
from jaxllm.speculative.ngram import NgramDrafter

VOCAB, SEQS, DRAFTS, LENGTH = 11, 256, 2, 16
#: the draft is 2, 3
PROMPT = [5, 1, 2, 3, 7, 1]
BONUS = 0.9
#: a request's parameters, and what they are for the oracle
KINDS: dict[str, tuple[dict[str, Any], Row]] = {
    "temperature": ({"temperature": 1.3}, Row(temperature=1.3)),
    "top_k": ({"temperature": 1.0, "top_k": 4}, Row(temperature=1.0, top_k=4)),
    "top_p": ({"temperature": 1.2, "top_p": 0.8}, Row(temperature=1.2, top_p=0.8)),
    "min_p": ({"temperature": 0.9, "min_p": 0.15}, Row(temperature=0.9, min_p=0.15)),
    # each position counts the drafts before it
    "penalties": (
        {"temperature": 0.8, "presence_penalty": 0.9, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
        Row(temperature=0.8, presence_penalty=0.9, frequency_penalty=0.6, repetition_penalty=1.3),
    ),
    "all": (
        {"temperature": 1.1, "frequency_penalty": -0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
        Row(temperature=1.1, frequency_penalty=-0.7, top_k=7, top_p=0.9, min_p=0.05),
    ),
    "logit bias": ({"temperature": 1.1, "logit_bias": {3: 0.8, 7: -1.5}}, Row(temperature=1.1, bias={3: 0.8, 7: -1.5})),
    "allowed": (
        {"temperature": 1.0, "allowed_token_ids": [2, 3, 5, 9]},
        Row(temperature=1.0, allowed={2, 3, 5, 9}),
    ),
    # what is added to the last token's logit grows with the outputs, of which the drafts are some
    "processor": ({"temperature": 1.0, "extra_args": {"bonus": BONUS}}, Row(temperature=1.0)),
    # the word is the draft: its end never comes
    "bad words": ({"temperature": 1.0}, Row(temperature=1.0, bad_words=[[2, 3]])),
    # the end does not come as the first token, and may as the second
    "min_tokens": ({"temperature": 1.0, "min_tokens": 1, "stop_token_ids": [4]}, Row(temperature=1.0)),
}
#: three positions of each sequence in each: 1e5 draws
LAUNCHES = 131


def add_bonus(logits: jax.Array, state: LogitsState) -> jax.Array:
    """More for the last token again, the more outputs there are."""
    rows = jnp.arange(len(logits))
    last = state.tokens[rows, state.length - 1]
    return logits.at[rows, last].add(state.extra_args["bonus"] * (state.length - state.prompt_length))


def make_programs() -> tuple[SamplingPrograms, State]:
    model = model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": False,
        }
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    page = model.kv_specs[0].page_shape(LENGTH)
    state = State(
        cache=array(1 + SEQS, *page, dtype=jnp.float32),
        tokens=array(1 + SEQS, LENGTH),
        drafting=array(1 + SEQS, DRAFTING_COLUMNS),
    )
    config = StepConfig(
        model=model,
        groups=kv_cache_groups(model.kv_specs),
        num_logprobs=0,
        logprobs_mode="raw_logprobs",
        max_scored_tokens=1,
        drafter=NgramDrafter(DRAFTS, 1, 1),
        processors=(LogitsProcessor(add_bonus, extra_args={"bonus": 0.0}),),
    )
    params = shapes(decoder_specs(model), jnp.dtype(jnp.float32), sharding)
    programs = SamplingPrograms(
        config,
        (Bucket(SEQS, SEQS),),
        1,
        params,
        state,
        platform="cpu",
        eager=True,
        cache_dir=None,
        draft_buckets=(Bucket(SEQS, SEQS, decode_only=True),),
    )
    zeros: Any = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), state)
    return programs, zeros


def make_params(programs: SamplingPrograms) -> tuple[Params, np.ndarray]:
    """Weights of a model that looks at the last token alone, and the logits behind each token, float64 [V, V]."""
    random = np.random.default_rng(3)
    embedding, head = random.standard_normal((2, VOCAB, 16)).astype(np.float32)
    head *= 0.35
    params: Any = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), programs._params)
    norm = jax.tree.map(jnp.ones_like, params.norm)
    values = embedding.astype(np.float64)
    values /= np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6)
    # drafts are right now and then
    for token, following in itertools.pairwise(PROMPT[1:4]):
        head[following] += 0.22 * values[token]
    params = dataclasses.replace(params, embedding=jnp.asarray(embedding), head=jnp.asarray(head), norm=norm)
    return params, values @ head.T.astype(np.float64)


def scheduled(kinds: list[str]) -> SchedulerOutput:
    step = SchedulerOutput.empty(0)
    for row, kind in enumerate(kinds):
        params = SamplingParams(**KINDS[kind][0])
        step.admitted.append(
            AdmittedRequest(
                row=row,
                request_id=str(row),
                token_ids=PROMPT,
                num_prompt_tokens=len(PROMPT),
                num_computed_tokens=0,
                params=params,
                seed=0,
                stop_token_ids=frozenset(params.stop_token_ids or ()),
                block_ids=([1 + row],),
                bad_words=tuple(tuple(word) for word in KINDS[kind][1].bad_words),
            )
        )
        step.rows.append(row)
        step.starts.append(len(PROMPT) - 1)
    step.counts = step.wanted = [1 + DRAFTS] * len(kinds)
    step.resumes = [False] * len(kinds)
    step.num_drafts = DRAFTS
    return step


def outcomes(logits: np.ndarray, kind: str) -> dict[tuple[int, ...], float]:
    """What a step can bring -> how likely that is, by the formula."""
    row, found, reached = KINDS[kind][1], {}, 1.0
    draft = PROMPT[2:4]
    for place in range(1 + DRAFTS):
        row.prompt, row.outputs = PROMPT, draft[:place]
        if kind == "min_tokens":
            row.allowed = set(range(VOCAB)) - {4} if place == 0 else None
        last = (PROMPT + row.outputs)[-1]
        scores = adjusted(logits[last], row)
        if kind == "processor":
            scores[last] += BONUS * len(row.outputs)
        likely = probabilities(scores, row)
        for token in range(VOCAB):
            if place == DRAFTS or token != draft[place]:
                found[*draft[:place], token] = reached * likely[token]
        if place < DRAFTS:
            reached *= likely[draft[place]]
    return found


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, dict[str, list[tuple[int, ...]]]]:
    """The model's logits, and what came of all checks."""
    programs, state = make_programs()
    params, logits = make_params(programs)
    kinds = [list(KINDS)[row % len(KINDS)] for row in range(SEQS)]
    step = scheduled(kinds)
    (bucket, packing), *_ = programs.draft_packings.items()
    rows, sampling = Rows(SEQS, 1, 1), SamplingRows(programs)
    rows.update(step)
    for request in step.admitted:
        sampling.admit(request)
    packed = sampling.pack_decode_steps(step, rows, packing)
    packing.views(packed.buffer[: packing.size])["check_costs"][...] = 0
    order = packed.sampled_entries
    tokens = np.zeros(state.tokens.shape, np.int32)
    tokens[:, : len(PROMPT)] = PROMPT
    program = programs.lower_draft_steps(bucket, True).compile(compiler_options=THOROUGH)  # pyright: ignore
    state = State(cache=state.cache, tokens=jnp.asarray(tokens), drafting=state.drafting)
    forms = DraftParams(params, (params,) * len(programs.adaptive.lengths))
    constraints = jnp.asarray(packed.constraints)
    seeds = np.random.default_rng(8)
    found: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in KINDS}
    for _ in range(LAUNCHES):
        buffer = packed.buffer.copy()
        fields = programs.sample_packing.views(buffer[packing.size :])
        for word in ("seed_low", "seed_high"):
            fields[word][...] = seeds.integers(-(2**31), 2**31, SEQS)
        state, result = program(forms, state, jnp.asarray(buffer), constraints)
        ids, counts = np.asarray(result.token_ids), np.asarray(result.counts)
        for place, entry in enumerate(order.tolist()):
            found[kinds[entry]].append(tuple(ids[place, : counts[place]].tolist()))
    return logits, found


@pytest.mark.parametrize("kind", KINDS)
def test_accepted_tokens_are_distributed_by_the_formula(drawn: Any, kind: str):
    logits, found = drawn
    expected, draws = outcomes(logits, kind), found[kind]
    assert sum(expected.values()) == pytest.approx(1.0)
    assert set(draws) <= {outcome for outcome, likely in expected.items() if likely > 0}
    likely = [(outcome, p * len(draws)) for outcome, p in expected.items() if p * len(draws) >= 5]
    observed = [draws.count(outcome) for outcome, _ in likely]
    # what is too rare to be compared by itself is compared together
    counts = [*observed, len(draws) - sum(observed)]
    wanted = [*(count for _, count in likely), len(draws) - sum(count for _, count in likely)]
    if wanted[-1] < 5:
        counts, wanted = [*counts[:-2], sum(counts[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    assert stats.chisquare(counts, wanted).pvalue > 1e-4
    assert len({len(outcome) for outcome, _ in likely}) > 1
