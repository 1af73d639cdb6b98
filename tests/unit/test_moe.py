"""Experts: which ones a token goes to, against transformers' own routers; and what becomes of it there, against the
sum over all of its experts in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_donation import MIXTRAL, OPTIONS, make_programs

from jaxllm.layers import token_exchange
from jaxllm.layers.context import Context
from jaxllm.layers.moe import Experts, MoEConfig, SparseMLP, route, sparse_mlp, through_experts
from jaxllm.runner.buckets import Bucket

HIDDEN, EXPERTS, TOP_K = 32, 16, 4
#: (transformers' module and class, its config's fields, ours)
ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {"num_local_experts": EXPERTS}, {"renormalise": True}),
    "qwen2": ("qwen2_moe", "Qwen2MoeTopKRouter", {"num_experts": EXPERTS, "norm_topk_prob": False}, {}),
    "qwen3": (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": EXPERTS, "norm_topk_prob": True},
        {"renormalise": True},
    ),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": EXPERTS}, {"routing": "softmax of chosen"}),
    "deepseek-v2 greedy": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"num_experts": EXPERTS, "topk_method": "greedy", "routed_scaling_factor": 3.0, "n_group": 1, "topk_group": 1},
        {"scale": 3.0},
    ),
    "deepseek-v2 groups": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {
            "num_experts": EXPERTS,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
            "n_group": 4,
            "topk_group": 2,
        },
        {"scale": 1.5, "groups": 4, "top_groups": 2},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            "num_local_experts": EXPERTS,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        {"routing": "sigmoid", "groups": 4, "top_groups": 2, "renormalise": True, "scale": 2.5},
    ),
    "deepseek-v3 without groups": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            "num_local_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
        {"routing": "sigmoid"},
    ),
}


def moe_config(num_experts: int = EXPERTS, top_k: int = TOP_K, **fields: Any) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, top_k=top_k, intermediate_size=6, **fields)


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_go_where_transformers_sends_them(name: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module, cls, theirs, ours = ROUTERS[name]
    modelling = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[cls])
    configs = {"gpt_oss": "GptOss", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}
    config_class = getattr(transformers, f"{configs.get(module, cls.removesuffix('TopKRouter'))}Config")
    router = getattr(modelling, cls)(config_class(hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **theirs))
    draw = np.random.default_rng(sum(name.encode()))
    correction = None
    with torch.no_grad():
        router.weight.copy_(torch.tensor(draw.normal(size=(EXPERTS, HIDDEN)) / 4))
        if hasattr(router, "bias"):
            router.bias.copy_(torch.tensor(draw.normal(size=EXPERTS)))
        if hasattr(router, "e_score_correction_bias"):
            correction = draw.normal(size=EXPERTS).astype(np.float32) / 3
            router.e_score_correction_bias.copy_(torch.tensor(correction))
        scores, their_weights, their_experts = router(
            torch.tensor(draw.normal(size=(200, HIDDEN)), dtype=torch.float32)
        )
    weights, experts = route(
        moe_config(**ours), jnp.asarray(scores.numpy()), None if correction is None else jnp.asarray(correction)
    )
    by_expert = np.zeros((2, 200, EXPERTS), np.float32)
    for found, chosen, values in zip(by_expert, (experts, their_experts), (weights, their_weights), strict=True):
        np.put_along_axis(found, np.asarray(chosen), np.asarray(values), axis=1)
    np.testing.assert_allclose(by_expert[0], by_expert[1], rtol=1e-6, atol=1e-7)
    assert ((by_expert > 0).sum(-1) == TOP_K).all()


TOKENS, E, K, D, F, LAYERS = 9, 6, 3, 8, 5, 2
CONTEXTS = {"one device": 1, "spread over two": 2, "spread over three": 3}


@functools.cache
def computed(devices: int, stacked: bool) -> Any:
    """`through_experts`, on devices of which each has some of the experts; or all of them, in a stack of layers."""

    def whole(gate_up, down, *given) -> jax.Array:
        layer = jnp.int32(1) if stacked else None
        experts = Experts(gate_up=gate_up, gate_up_bias=None, down=down, down_bias=None, layer=layer)
        context = Context(split=(("experts", "tp"),) if devices > 1 else ())
        return through_experts(context, moe_config(E, K, expert_parallel=devices > 1), "silu", experts, *given)

    if devices == 1:
        return jax.jit(whole)

    def spread(gate_up, down, *given) -> jax.Array:
        parts = (w.reshape(devices, E // devices, *w.shape[1:]) for w in (gate_up, down))
        each = jax.vmap(whole, in_axes=(0, 0, *(None for _ in given)), axis_name="tp")
        return each(*parts, *given).sum(axis=0)

    return jax.jit(spread)


def expected(
    x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, weights: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, up = np.split(gate_up[expert] @ row, 2)
            out[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("name", CONTEXTS)
@settings(max_examples=30, deadline=None)
@given(
    chosen=st.lists(st.permutations(range(E)), min_size=TOKENS, max_size=TOKENS),
    valid=st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
    stacked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(chosen=[range(E)] * TOKENS, valid=[True] * TOKENS, stacked=False, seed=0)
@example(chosen=[range(E)[::-1]] * TOKENS, valid=[False] * TOKENS, stacked=True, seed=0)
def test_every_token_gets_the_sum_of_its_own_experts(name: str, chosen: Any, valid: Any, stacked: bool, seed: int):
    """However uneven the choice is: all tokens may go to the same three. What nobody may read is NaN: padding, experts
    that no token goes to, other layers.
    """
    devices, draw = CONTEXTS[name], np.random.default_rng(seed)
    stacked &= devices == 1
    chosen, valid = np.array([list(order[:K]) for order in chosen], np.int32), np.array(valid)
    x, weights = draw.normal(size=(TOKENS, D)), draw.random((TOKENS, K))
    gate_up, down = draw.normal(size=(E, 2 * F, D)), draw.normal(size=(E, D, F))
    wanted = np.where(valid[:, None], expected(x, gate_up, down, weights, chosen), 0)
    unused = [expert for expert in range(E) if expert not in chosen[valid]]
    gate_up[unused], down[unused], x[~valid], weights[~valid] = np.nan, np.nan, np.nan, np.nan
    if stacked:
        gate_up, down = (np.stack([np.full_like(w, np.nan), w]) for w in (gate_up, down))
    arrays = [jnp.asarray(array, jnp.float32) for array in (gate_up, down, x, weights)]
    got = computed(devices, stacked)(*arrays, jnp.asarray(chosen), jnp.asarray(valid))
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_read_where_they_lie(dtype: str):
    """A step's temporaries are smaller than the experts of a layer, of which a scan over layers would make copies."""
    programs, _ = make_programs(dtype, 40, buckets=(Bucket(1, 1), Bucket(4, 2)), config=MIXTRAL)
    programs._options = OPTIONS
    programs._compile([("forward", bucket) for bucket in programs.packings])
    experts = 3 * MIXTRAL["num_local_experts"] * MIXTRAL["hidden_size"] * MIXTRAL["intermediate_size"]
    for program in programs._compiled.values():
        memory = program.memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes < experts * jnp.dtype(dtype).itemsize


COPIES, DEVICES = 2, 3
#: how tokens go to experts of other copies: all to all of them; or one by one, where one is more than there is room for
EXCHANGES = {"gathered": None, "sent": 4}


@functools.cache
def of_copies() -> Any:
    """`sparse_mlp` of copies of a model that have its experts between them, on some devices each: x [copies, T, d] and
    valid [copies, T] -> [copies, devices, T, d].
    """

    def one(gate_up, down, router, x, valid) -> jax.Array:
        experts = Experts(gate_up=gate_up, gate_up_bias=None, down=down, down_bias=None)
        weights = SparseMLP(router, None, None, experts, None, None, None)
        split = (("experts", ("data", "tensor")), ("mlp", "tensor"), ("tokens", "data"))
        context, config = Context(split=split), moe_config(E, K, expert_parallel=True)
        return sparse_mlp(context, config, "silu", weights, x, token_exchange.of_all_copies(context, valid))[0]

    def all_of_them(gate_up, down, *given) -> jax.Array:
        parts = (w.reshape(COPIES, DEVICES, E // (COPIES * DEVICES), *w.shape[1:]) for w in (gate_up, down))
        devices = jax.vmap(one, in_axes=(0, 0, None, None, None), axis_name="tensor")
        return jax.vmap(devices, in_axes=(0, 0, None, 0, 0), axis_name="data")(*parts, *given)

    return jax.jit(all_of_them)


@pytest.fixture(params=EXCHANGES)
def exchange(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if EXCHANGES[request.param] is not None:
            patch.setattr(token_exchange, "room_for_sent", lambda *_: EXCHANGES[request.param])
        of_copies.cache_clear()
        yield request.param
    of_copies.cache_clear()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.permutations(range(E)), min_size=COPIES * TOKENS, max_size=COPIES * TOKENS),
    valid=st.lists(st.booleans(), min_size=COPIES * TOKENS, max_size=COPIES * TOKENS),
    seed=st.integers(0, 2**32 - 1),
)
@example(chosen=[range(E)] * COPIES * TOKENS, valid=[True] * COPIES * TOKENS, seed=0)
@example(chosen=[range(E)[::-1]] * COPIES * TOKENS, valid=[True] * TOKENS + [False] * TOKENS, seed=0)
@example(chosen=[range(E)] * COPIES * TOKENS, valid=[False] * COPIES * TOKENS, seed=0)
@example(chosen=[range(E)] * COPIES * TOKENS, valid=([True] * 3 + [False] * 6) * COPIES, seed=0)
def test_copies_that_share_experts_get_what_one_would(exchange: str, chosen: Any, valid: Any, seed: int):
    """However uneven the choice is: all tokens of both copies may go to the experts of one copy's devices, and a copy
    may have none. Experts that no token goes to are NaN.
    """
    draw, valid = np.random.default_rng(seed), np.array(valid).reshape(COPIES, TOKENS)
    # the router reads a token's scores off its first numbers
    router, x = np.eye(E, D), draw.normal(size=(COPIES * TOKENS, D))
    scores = np.empty((COPIES * TOKENS, E))
    np.put_along_axis(scores, np.array([list(order) for order in chosen]), np.linspace(2, 1, E)[None], axis=1)
    x[:, :E] = scores
    likely = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    best = np.array([list(order[:K]) for order in chosen])
    gate_up, down = draw.normal(size=(E, 2 * F, D)), draw.normal(size=(E, D, F))
    wanted = expected(x, gate_up, down, np.take_along_axis(likely, best, axis=1), best).reshape(COPIES, TOKENS, D)
    unused = [expert for expert in range(E) if expert not in best[valid.reshape(-1)]]
    gate_up[unused], down[unused] = np.nan, np.nan
    arrays = [jnp.asarray(array, jnp.float32) for array in (gate_up, down, router, x.reshape(COPIES, TOKENS, D))]
    got = of_copies()(*arrays, jnp.asarray(valid))
    for device in range(DEVICES):
        np.testing.assert_allclose(got[:, device], np.where(valid[..., None], wanted, 0), atol=1e-4, rtol=1e-4)


def test_tokens_are_sent_where_that_moves_fewer_bytes():
    """To few of many copies, in steps of many tokens: half of the room that all tokens would take, or less."""
    assert [token_exchange.room_for_sent(1024, copies, 1) for copies in (2, 3, 4, 8)] == [None, 512, 384, 192]
    assert [token_exchange.room_for_sent(1024, copies, 2) for copies in (4, 8)] == [None, 360]
    assert token_exchange.room_for_sent(64, 8, 1) is None and token_exchange.room_for_sent(4096, 8, 8) is None
