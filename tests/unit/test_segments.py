"""Layers in one segment, one each, or others: the same weights, however they are read, drawn or saved."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.config.cache import kv_cache_groups
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.model import ModelConfig, body_specs, forward
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config, pooling_model_config
from jaxllm.models.segments import resegment, segment_sizes
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.mesh import TENSOR
from jaxllm.parallel.rules import device_bytes, shapes
from jaxllm.weights import loader
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import orbax
from jaxllm.weights.formats.tensor_files import TensorFiles
from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch

LAYERS = 3
SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
#: what each family has that others lack: windows, biases, norms of heads, norms behind blocks, two kinds of rope
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "Qwen3": {"head_dim": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2, "rope_local_base_freq": 100.0},
}
MODEL = dataclasses.replace(
    model_config({**SMALL, "architectures": ["Qwen2ForCausalLM"]}),
    qk_norm=True,
)
BERT = pooling_model_config({**SMALL, "architectures": ["BertModel"], "type_vocab_size": 2})
STACKED = decoder_specs(MODEL)
EACH = (1,) * LAYERS
SEPARATE = resegment(STACKED, EACH)
#: of a model with runs of equal layers
SEGMENTS = {"one": (LAYERS,), "each": EACH, "two": (1, 2)}
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
FLOAT32, BFLOAT16 = jnp.dtype(np.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Every tensor of `STACKED`, each with numbers of its own."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(part.shape, np.float32)
        for spec in jax.tree.leaves(STACKED)
        for name, part in spec.tensors()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def draw(specs: Any, dtype: np.dtype = FLOAT32) -> Any:
    """Numbers in the place of specs."""
    random = np.random.default_rng(1)

    def numbers(wanted: Any) -> jax.Array:
        codes = np.issubdtype(wanted.dtype, np.integer)
        drawn = random.integers(0, 16, wanted.shape) if codes else random.standard_normal(wanted.shape)
        return jax.device_put(drawn.astype(wanted.dtype), DEVICE)

    return jax.tree.map(numbers, shapes(specs, dtype, DEVICE))


def read(folder: Path, specs: Params) -> Params:
    with TensorFiles(folder) as reader:
        return loader.load(reader, specs, FLOAT32, DEVICE, progress=False)


def check_rows(other: Params, stacked: Params) -> None:
    """Each segment of the one has its layers' rows of the other's only one; all else is equal."""
    [stack] = stacked.layers
    first = 0
    for segment, size in zip(other.layers, segment_sizes(other), strict=True):
        rows = slice(first, first + size)
        jax.tree.map(lambda mine, all, rows=rows: np.testing.assert_array_equal(mine, all[rows]), segment, stack)
        first += size
    assert first == LAYERS
    rest = (jax.tree.leaves(dataclasses.replace(params, layers=None)) for params in (other, stacked))
    for mine, theirs in zip(*rest, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("sizes", SEGMENTS.values(), ids=SEGMENTS)
def test_a_checkpoint_is_read_into_any_segments(checkpoint: Path, sizes: tuple[int, ...]):
    found = read(checkpoint, resegment(STACKED, sizes))
    assert segment_sizes(found) == sizes
    check_rows(found, read(checkpoint, STACKED))


def test_a_checkpoint_that_does_not_fit_is_refused_in_any_segments(checkpoint: Path):
    with TensorFiles(checkpoint) as reader:
        more = resegment(decoder_specs(dataclasses.replace(MODEL, num_layers=LAYERS + 1)), (1,) * (LAYERS + 1))
        with pytest.raises(WeightsError, match=r"no tensor 'model.layers.3.input_layernorm.weight'"):
            loader.check(reader, more)
        less = resegment(decoder_specs(dataclasses.replace(MODEL, num_layers=LAYERS - 1)), (1,) * (LAYERS - 1))
        loader.check(reader, less)
        without = resegment(decoder_specs(dataclasses.replace(MODEL, qkv_bias=False)), (1,) * (LAYERS))
        with pytest.raises(WeightsError, match=r"'model.layers.0.self_attn.k_proj.bias', which the model's config has"):
            loader.check(reader, without)


def test_dummy_weights_of_separate_layers(monkeypatch: pytest.MonkeyPatch):
    traced = []
    normal = loader._draw
    monkeypatch.setattr(loader, "_draw", lambda key, shape, dtype: traced.append(shape) or normal(key, shape, dtype))
    drawn = loader.dummy(SEPARATE, FLOAT32, DEVICE)
    assert len(traced) == len(set(traced)), "layers share a program"
    values = [np.asarray(layer.qkv) for layer in drawn.layers]
    assert all(0.015 < array.std() < 0.025 for array in values) and len({array.tobytes() for array in values}) == LAYERS
    assert all((np.asarray(layer.query_norm) == 1).all() for layer in drawn.layers)


@pytest.mark.parametrize("sizes", SEGMENTS.values(), ids=SEGMENTS)
def test_dummy_weights_are_the_same_in_any_segments(sizes: tuple[int, ...]):
    """And so in any stages of a pipeline, which have segments of the model."""
    check_rows(loader.dummy(resegment(STACKED, sizes), FLOAT32, DEVICE), loader.dummy(STACKED, FLOAT32, DEVICE))


@pytest.mark.parametrize("saved", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("loaded", SEGMENTS.values(), ids=SEGMENTS)
def test_a_saved_model_is_loaded_into_any_segments(tmp_path: Path, saved: tuple[int, ...], loaded: tuple[int, ...]):
    stacked = draw(STACKED, BFLOAT16)
    orbax.save(tmp_path, resegment(stacked, saved), resegment(STACKED, saved))
    wanted = shapes(resegment(STACKED, loaded), BFLOAT16, DEVICE)
    found = orbax.load(tmp_path, resegment(STACKED, loaded), BFLOAT16, DEVICE)
    for array, shape in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (array.dtype, array.sharding) == (shape.dtype, shape.sharding)
    check_rows(found, stacked)


def test_a_saved_model_of_another_depth_is_refused_in_the_form_of_the_file(tmp_path: Path):
    orbax.save(tmp_path, draw(SEPARATE), SEPARATE)
    less = resegment(decoder_specs(dataclasses.replace(MODEL, num_layers=2)), (1,) * (2))
    with pytest.raises(WeightsError, match=r"'layers\.attention_norm' has shape \(3, 16\), .* asks for \(2, 16\)"):
        orbax.load(tmp_path, less, FLOAT32, DEVICE)


@pytest.mark.parametrize("specs", [STACKED, body_specs(BERT)], ids=["decoder", "BERT"])
def test_segments_are_cut_and_joined(specs: Params):
    stacked = draw(specs)
    for sizes in SEGMENTS.values():
        other = resegment(stacked, sizes)
        check_rows(other, stacked)
        wanted = shapes(resegment(specs, sizes), FLOAT32, None)
        jax.tree.map(lambda shape, array: np.testing.assert_equal(shape.shape, array.shape), wanted, other)
        check_rows(resegment(resegment(other, (2, 1)), (LAYERS,)), stacked)
        assert resegment(other, sizes) is other
    each = resegment(stacked, EACH)
    assert resegment(each, (1, 2)).layers[0] is each.layers[0], "a segment that stays is not copied"


@pytest.mark.parametrize("family", [*FAMILIES, "BERT"])
def test_any_segments_compute_the_same(family: str):
    """Of two sequences, one with tokens of earlier steps; every page holds something, so a wrong one would show."""
    config: ModelConfig = BERT
    if family != "BERT":
        config = model_config({**SMALL, **FAMILIES[family], "architectures": [f"{family}ForCausalLM"]})
    groups = kv_cache_groups(config.kv_specs)
    random = np.random.default_rng(2)
    blocks = 1 + 4 * len(groups)
    pages = max(len(group.layers) for group in groups) * blocks
    cache = random.standard_normal((pages, 2 * config.num_kv_heads, 4, config.head_dim), np.float32)
    attention = AttentionBatch(
        token_seq=jnp.asarray([0, 1, 1, 1, 1, 1]),
        positions=jnp.asarray([6, 0, 1, 2, 3, 4]),
        token_valid=jnp.ones(6, bool),
        query_start=jnp.asarray([0, 1, 6]),
        kv_lens=jnp.asarray([7, 5]),
        block_tables=jnp.arange(1, blocks).reshape(len(groups), 2, 2),
        num_decodes=jnp.asarray(1),
        num_seqs=jnp.asarray(2),
    )
    batch = StepBatch(tokens=jnp.arange(6), attention=attention)
    params = draw(body_specs(config))
    context = Context(backend=Backend(implementation="reference"))
    step = jax.jit(functools.partial(forward, context, config, groups))
    expected, *found = (step(resegment(params, sizes), cache, batch) for sizes in SEGMENTS.values())
    for other in found:
        jax.tree.map(lambda mine, whole: np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-5), other, expected)


def test_segments_are_split_over_devices_as_one_is():
    whole = jax.sharding.NamedSharding(jax.sharding.AbstractMesh((4,), (TENSOR,)), jax.P())
    [stack] = shapes(STACKED, FLOAT32, whole).layers
    for layer in shapes(SEPARATE, FLOAT32, whole).layers:
        for mine, all_layers in zip(jax.tree.leaves(layer), jax.tree.leaves(stack), strict=True):
            assert mine.shape == (1, *all_layers.shape[1:]) and mine.sharding == all_layers.sharding
    assert device_bytes(SEPARATE, FLOAT32, {TENSOR: 4}) == device_bytes(STACKED, FLOAT32, {TENSOR: 4})
