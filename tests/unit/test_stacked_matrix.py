"""Products of a single row: the formula, and the whole way through a model and an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from support.live_buffers import live
from support.paged_model import PagedModel
from support.tiny_model import SMALL as ENGINE
from support.tiny_model import write_tiny_model
from test_segments import BFLOAT16, FAMILIES, SMALL, draw

from jaxllm import LLM, SamplingParams
from jaxllm.layers.context import Context
from jaxllm.layers.linear import gated_linear, linear, linear_f32
from jaxllm.layers.stacked_matrix import MAX_PARTS, StackedMatrix, can_be_read
from jaxllm.layers.weight_storage import Int4Layout, Layout, ScaledLayout
from jaxllm.models import segments
from jaxllm.models.matrices import quantized
from jaxllm.models.registry import model_config
from jaxllm.models.segments import segment_sizes
from jaxllm.models.specs import decoder_specs
from jaxllm.runner.heads.weight_forms import with_whole_layers
from pallas_kernels.backend import Backend

#: of one token and of eight; what more requests and longer steps compile has none of these products
BUCKETS = {**ENGINE, "dtype": "bfloat16", "max_num_seqs": 1, "max_num_batched_tokens": 8, "enforce_eager": False}
#: Mistral's and Qwen 3's layers have nothing that these have not
SOME = {name: FAMILIES[name] for name in ("Llama", "Qwen2", "Gemma3")}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@given(
    vectors=st.one_of(st.integers(1, 40), st.sampled_from((MAX_PARTS, MAX_PARTS + 1, 97, 128))),
    out_features=st.integers(1, 40),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from((BFLOAT16, np.dtype(np.float32))),
)
@settings(max_examples=20, deadline=None)
def test_a_row_times_a_matrix_is_the_formula(
    vectors: int, out_features: int, layers: int, seed: int, dtype: np.dtype[Any]
):
    """Also of a number of in-features that has no divisor but itself."""
    random = np.random.default_rng(seed)
    in_features, layer = 16 * vectors, int(random.integers(layers))
    stack = random.standard_normal((layers, out_features, in_features)).astype(dtype)
    x = random.standard_normal((1, in_features)).astype(dtype)
    weight = StackedMatrix(jnp.asarray(stack.view(np.uint16) if dtype == BFLOAT16 else stack))
    found = jax.jit(lambda x, w, layer: linear_f32(Context(), x, w.of_layer(layer)))(x, weight, jnp.int32(layer))
    exact, wide = x.astype(np.float64), stack[layer].astype(np.float64)
    assert found.dtype == jnp.float32 and found.shape == (1, out_features)
    bound = (in_features + 8) * 2.0**-24 * (abs(exact) @ abs(wide).T)
    assert (abs(np.asarray(found) - exact @ wide.T) <= bound).all()


def test_a_kernel_writes_what_the_layer_hands_on():
    """bfloat16, unless a bias is added in float32 first, or scores are asked for."""
    names = ("jaxllm_dense_bfloat16_16_", "jaxllm_gated_silu_bfloat16_16_")
    context = Context(backend=Backend(cpu_dense=names))
    x, stack = jnp.zeros((3, 64), jnp.bfloat16), jnp.zeros((2, 8, 64), jnp.bfloat16)
    weight, bias = StackedMatrix(stack, jnp.int32(1)), jnp.zeros(8, jnp.bfloat16)
    for call, dtype in (
        (lambda x: linear(context, x, weight), jnp.bfloat16),
        (lambda x: linear(context, x, stack[0]), jnp.bfloat16),
        (lambda x: linear(context, x, weight, bias), jnp.float32),
        (lambda x: gated_linear(context, x, weight, None, "silu"), jnp.bfloat16),
        (lambda x: linear_f32(context, x, weight), jnp.float32),
    ):
        made = [each for each in jax.make_jaxpr(call)(x).eqns if each.primitive.name == "ffi_call"]
        assert [each.outvars[0].aval.dtype for each in made] == [dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("in_features", [16, 48, 64, 576, 896, 1536, 2048, 4096, 4864, 8192, 11008, 14336, 18944])
def test_matrices_with_narrow_parts_are_read(in_features: int, dtype: str):
    assert can_be_read(jax.ShapeDtypeStruct((2, 8, in_features), jnp.dtype(dtype)))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_numbers_of_other_kinds_are_multiplied_as_ever(dtype: str):
    assert not can_be_read(jax.ShapeDtypeStruct((2, 8, 64), jnp.dtype(dtype)))


@pytest.mark.parametrize("in_features", [20, 592, 2096, 1552])
def test_matrices_with_wide_parts_are_multiplied_as_ever(in_features: int):
    """16 times a prime number has no other divisor."""
    assert not can_be_read(jax.ShapeDtypeStruct((2, 8, in_features), BFLOAT16))


def test_several_rows_take_the_weight_itself():
    random = np.random.default_rng(0)
    x, stack = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((5, 48), (1, 7, 48)))
    nothing = jnp.zeros(stack.shape, jnp.uint16)
    weight = StackedMatrix(nothing, jnp.int32(0), several=stack[0])
    np.testing.assert_array_equal(linear(Context(), x, weight), linear(Context(), x, stack[0]))


@pytest.mark.parametrize(
    ("family", "dtype", "most"),
    [
        *(pytest.param(family, "bfloat16", 0.05, marks=pytest.mark.thorough) for family in [*SOME, "Cohere"]),
        ("Gemma3", "float32", 1e-5),
    ],
)
def test_a_model_reads_its_matrices_where_they_lie(family: str, dtype: str, most: float):
    """Some of them: those whose in-features are not a multiple of 16 stay as they are."""
    # the norms of each head of Cohere are no matrices
    fields = {**FAMILIES, "Cohere": {"use_qk_norm": True, "head_dim": 16}}[family]
    config = model_config({**SMALL, **fields, "architectures": [f"{family}ForCausalLM"]})
    params = draw(decoder_specs(config), jnp.dtype(dtype))
    whole = with_whole_layers(params)
    kinds = [isinstance(leaf, StackedMatrix) for leaf in jax.tree.leaves(whole.layers, is_leaf=_is_matrix)]
    assert 0 < sum(kinds) < len(kinds) and isinstance(whole.head, StackedMatrix) == (dtype == "bfloat16")
    plain, own = (
        PagedModel(config, given, block_size=4, max_len=16, buckets=[1], num_seqs=1, cache_dtype=jnp.dtype(dtype))
        for given in (params, whole)
    )
    for token in (3, 20, 36, 5, 11):
        expected, found = (model.step({"a": [token]})["a"] for model in (plain, own))
        assert abs(found - expected).max() <= most * abs(expected).max()


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
def test_layers_of_several_forms_are_scanned_together(family: str, monkeypatch: pytest.MonkeyPatch):
    """Runs of them, some of a single layer, under windows and biases that differ from layer to layer."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 16}
    fields = {**SMALL, **FAMILIES[family], **sizes, "architectures": [f"{family}ForCausalLM"]}
    config = model_config(fields)
    int8 = ScaledLayout(dtype="int8", group=0, scale_dtype="float32")
    int4 = Int4Layout(group=32, scale_dtype="float32")

    def layout(name: str) -> Layout | None:
        """In layers 2 and 5 the matrix of queries, keys and values is joined of two forms."""
        found = re.search(r"layers\.(\d)\.", name)
        return found and (int4 if found[1] in "25" and "v_proj" not in name else int8)

    params = draw(quantized(decoder_specs(config), layout))
    assert segment_sizes(params) == (2, 1, 2, 1)
    scans, scan = [], lax.scan
    monkeypatch.setattr(segments.lax, "scan", lambda *given, **named: scans.append(0) or scan(*given, **named))
    found = []
    for weights in (params, with_whole_layers(params)):
        scans.clear()
        model = PagedModel(config, weights, block_size=4, max_len=16, buckets=[1], num_seqs=1)
        found.append([model.step({"a": [token]})["a"] for token in (3, 20, 36, 5, 11)])
        assert len(scans) == (2 if weights is params else 1)
    for mine, expected in zip(*found, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-4 * abs(expected).max())


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, StackedMatrix)


@pytest.fixture(scope="module", autouse=True)
def without_kernels() -> Iterator[None]:
    """As where llvmlite or the processor's features are missing: kernels would take these products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxllm.runner.compile.cpu_kernels.load_dense", lambda *_, **__: "")
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(write_tiny_model(tmp_path_factory.mktemp("model")), **{**BUCKETS, "dtype": request.param}) as llm:
        yield llm


def text(llm: LLM) -> str:
    return llm.generate("one prompt", GREEDY, use_tqdm=False)[0].outputs[0].text


def matrices(tree: Any) -> list[StackedMatrix]:
    leaves = jax.tree.leaves(tree, is_leaf=_is_matrix)
    return [leaf for leaf in leaves if _is_matrix(leaf)]


def test_they_are_in_the_weights_own_memory(llm: LLM):
    runner: Any = llm.engine.runner
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(runner.params)}
    found: list[Any] = matrices(runner.head._forms["one row"].layers) + matrices(runner.head._head)
    assert len(found) == (5 if runner.params.embedding.dtype == jnp.bfloat16 else 4)
    assert all(matrix.stored.unsafe_buffer_pointer() in own for matrix in found)


@pytest.mark.parametrize("llm", ["bfloat16"], indirect=True)
def test_a_launch_of_several_steps_reads_them_too(tmp_path: Path, llm: LLM):
    (folder := tmp_path / "same").mkdir()
    with LLM(write_tiny_model(folder), num_decode_steps=4, **BUCKETS) as several:
        runner: Any = several.engine.runner
        head = runner.head
        bucket = next(iter(head.programs.decode_packings))
        assert len(matrices(head._params_for(bucket))) == 5
        assert text(several) == text(llm)


def test_nothing_of_them_outlives_the_weights(tmp_path: Path):
    before = live()
    with LLM(write_tiny_model(tmp_path), **BUCKETS) as llm:
        runner: Any = llm.engine.runner
        weights = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(runner.params)}
        text(llm)
        llm.sleep(2)
        assert not weights & live()
        llm.wake_up()
        text(llm)
    assert live() <= before


@pytest.mark.parametrize("option", [{"deterministic": True}], ids=str)
def test_engines_without_them(tmp_path: Path, option: dict[str, Any]):
    with LLM(write_tiny_model(tmp_path), **{**BUCKETS, **option}) as llm:
        runner: Any = llm.engine.runner
        assert not matrices(runner.head._forms)
        assert not matrices(runner.head._head)
        assert text(llm)
