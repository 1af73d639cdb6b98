"""Layers stacked or separate: the same weights, whichever form they are read, drawn or saved in."""

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
from jaxllm.models.decoder import Params
from jaxllm.models.layer_stack import in_form
from jaxllm.models.model import ModelConfig, body_sources, forward
from jaxllm.models.registry import model_config, pooling_model_config
from jaxllm.models.sources import decoder_sources, separate_sources
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.rules import local_sources, split_shapes
from jaxllm.weights import loader
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import orbax
from jaxllm.weights.formats.safetensors import SafetensorsReader
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
STACKED = decoder_sources(MODEL)
SEPARATE = separate_sources(STACKED, LAYERS)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
FLOAT32, BFLOAT16 = jnp.dtype(np.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Every tensor of `STACKED`, each with numbers of its own."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal((part.rows, *([] if source.columns is None else [source.columns])), np.float32)
        for source in jax.tree.leaves(STACKED)
        for name, part in source.tensors()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def draw(sources: Any, dtype: np.dtype = FLOAT32) -> Any:
    """Numbers in the place of sources."""
    random = np.random.default_rng(1)
    shapes = loader.shapes(sources, dtype, DEVICE)
    return jax.tree.map(lambda s: jax.device_put(random.standard_normal(s.shape).astype(dtype), DEVICE), shapes)


def read(folder: Path, sources: Params) -> Params:
    with SafetensorsReader(folder) as reader:
        return loader.load(reader, sources, FLOAT32, DEVICE, progress=False)


def check_rows(separate: Params, stacked: Params) -> None:
    """Each layer of the one is a row of the other; all else is equal."""
    assert isinstance(separate.layers, tuple) and len(separate.layers) == LAYERS
    for i, layer in enumerate(separate.layers):
        jax.tree.map(lambda mine, stack, i=i: np.testing.assert_array_equal(mine, stack[i]), layer, stacked.layers)
    rest = (jax.tree.leaves(dataclasses.replace(params, layers=None)) for params in (separate, stacked))
    for mine, other in zip(*rest, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_checkpoint_is_read_into_either_form(checkpoint: Path):
    stacked = read(checkpoint, STACKED)
    separate = read(checkpoint, SEPARATE)
    check_rows(separate, stacked)
    assert isinstance(separate.layers, tuple)
    assert len({np.asarray(layer.qkv).tobytes() for layer in separate.layers}) == LAYERS


def test_a_checkpoint_that_does_not_fit_is_refused_in_either_form(checkpoint: Path):
    with SafetensorsReader(checkpoint) as reader:
        more = separate_sources(decoder_sources(dataclasses.replace(MODEL, num_layers=LAYERS + 1)), LAYERS + 1)
        with pytest.raises(WeightsError, match=r"no tensor 'model.layers.3.input_layernorm.weight'"):
            loader.check(reader, more)
        less = separate_sources(decoder_sources(dataclasses.replace(MODEL, num_layers=LAYERS - 1)), LAYERS - 1)
        loader.check(reader, less)
        without = separate_sources(decoder_sources(dataclasses.replace(MODEL, qkv_bias=False)), LAYERS)
        with pytest.raises(WeightsError, match=r"'model.layers.0.self_attn.k_proj.bias', which the model's config has"):
            loader.check(reader, without)


def test_dummy_weights_of_separate_layers(monkeypatch: pytest.MonkeyPatch):
    traced = []
    normal = loader._draw
    monkeypatch.setattr(loader, "_draw", lambda key, shape, dtype: traced.append(shape) or normal(key, shape, dtype))
    drawn = loader.dummy(SEPARATE, FLOAT32, DEVICE)
    assert isinstance(drawn.layers, tuple)
    assert len(traced) == len(set(traced)), "layers share a program"
    values = [np.asarray(layer.qkv) for layer in drawn.layers]
    assert all(0.015 < array.std() < 0.025 for array in values) and len({array.tobytes() for array in values}) == LAYERS
    assert all((np.asarray(layer.query_norm) == 1).all() for layer in drawn.layers)


@pytest.mark.parametrize("saved", [False, True], ids=["saved stacked", "saved separate"])
@pytest.mark.parametrize("loaded", [False, True], ids=["loaded stacked", "loaded separate"])
def test_a_saved_model_is_loaded_in_either_form(tmp_path: Path, saved: bool, loaded: bool):
    stacked = draw(STACKED, BFLOAT16)
    orbax.save(tmp_path, in_form(stacked, separated=saved))
    wanted = loader.shapes(SEPARATE if loaded else STACKED, BFLOAT16, DEVICE)
    found = orbax.load(tmp_path, wanted)
    for array, shape in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (array.dtype, array.sharding) == (shape.dtype, shape.sharding)
    if loaded:
        check_rows(found, stacked)
    else:
        jax.tree.map(np.testing.assert_array_equal, found, stacked)


def test_a_saved_model_of_another_depth_is_refused_in_the_form_of_the_file(tmp_path: Path):
    orbax.save(tmp_path, draw(SEPARATE))
    less = separate_sources(decoder_sources(dataclasses.replace(MODEL, num_layers=2)), 2)
    with pytest.raises(WeightsError, match=r"'layers\.attention_norm' has shape \(3, 16\), .* asks for \(2, 16\)"):
        orbax.load(tmp_path, loader.shapes(less, FLOAT32, DEVICE))


@pytest.mark.parametrize("sources", [STACKED, body_sources(BERT)], ids=["decoder", "BERT"])
def test_one_form_becomes_the_other_and_back(sources: Params):
    stacked = draw(sources)
    separate = in_form(stacked, separated=True)
    check_rows(separate, stacked)
    shapes = loader.shapes(separate_sources(sources, LAYERS), FLOAT32, None)
    assert jax.tree.structure(shapes) == jax.tree.structure(separate)
    jax.tree.map(np.testing.assert_array_equal, in_form(separate, separated=False), stacked)
    assert in_form(separate, separated=True) is separate and in_form(stacked, separated=False) is stacked


@pytest.mark.parametrize("family", [*FAMILIES, "BERT"])
def test_either_form_computes_the_same(family: str):
    """Of two sequences, one with tokens of earlier steps; every page holds something, so a wrong one would show."""
    config: ModelConfig = BERT
    if family != "BERT":
        config = model_config({**SMALL, **FAMILIES[family], "architectures": [f"{family}ForCausalLM"]})
    groups = kv_cache_groups(config.layer_window)
    random = np.random.default_rng(2)
    blocks = 1 + 4 * len(groups)
    pages = max(len(group.layers) for group in groups) * blocks
    cache = random.standard_normal((pages, 2, config.num_kv_heads, 4, config.head_dim), np.float32)
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
    params = draw(body_sources(config))
    context = Context(backend=Backend(implementation="reference"))
    step = jax.jit(functools.partial(forward, context, config, groups))
    found = [step(in_form(params, separated=separated), cache, batch) for separated in (False, True)]
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5), *found)


def test_separate_layers_are_split_as_stacked_ones():
    mesh = make_mesh(jax.devices()[:1])
    stacked, separate = (split_shapes(MODEL, FLOAT32, mesh, stacked=stacked) for stacked in (True, False))
    assert isinstance(separate.layers, tuple) and len(separate.layers) == LAYERS
    local = loader.shapes(local_sources(MODEL, 1, stacked=False), FLOAT32, None)
    jax.tree.map(lambda part, shape: np.testing.assert_equal(part.shape, shape.shape), separate, local)
    for layer in separate.layers:
        for mine, stack in zip(jax.tree.leaves(layer), jax.tree.leaves(stacked.layers), strict=True):
            assert (None, *mine.sharding.spec) == (tuple(stack.sharding.spec) or (None,))
