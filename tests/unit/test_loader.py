"""Checkpoints into `Params`: every value in its place, in every form that a checkpoint and a destination can have."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.api.errors import ValidationError
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.mesh import TENSOR
from jaxllm.weights import loader
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 36,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS, KV = 16, 8  # rows of queries, and of keys or values
LAYER = {
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (HEADS, 16),
    "self_attn.k_proj.weight": (KV, 16),
    "self_attn.v_proj.weight": (KV, 16),
    "self_attn.q_proj.bias": (HEADS,),
    "self_attn.k_proj.bias": (KV,),
    "self_attn.v_proj.bias": (KV,),
    "self_attn.o_proj.weight": (16, HEADS),
    "mlp.gate_proj.weight": (20, 16),
    "mlp.up_proj.weight": (20, 16),
    "mlp.down_proj.weight": (16, 20),
}
SHAPES = {
    "model.embed_tokens.weight": (36, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (36, 16),
    **{f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in LAYER.items()},
}
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def load(directory: Path, dtype: Any = jnp.float32, load_format: str = "auto") -> Params:
    checkpoint = Checkpoint(directory, load_format)
    specs = decoder_specs(model_config(checkpoint.config))
    return checkpoint.load(specs, jnp.dtype(dtype), DEVICE, seed=0, progress=False)


def by_hand(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each array should hold, joined and stacked."""

    def stacked(*names: str) -> np.ndarray:
        return np.stack([np.concatenate([tensors[f"model.layers.{i}.{n}"] for n in names]) for i in range(4)])

    return {
        "embedding": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"],
        "attention_norm": stacked("input_layernorm.weight"),
        "mlp_norm": stacked("post_attention_layernorm.weight"),
        "qkv": stacked(*(f"self_attn.{n}_proj.weight" for n in "qkv")),
        "qkv_bias": stacked(*(f"self_attn.{n}_proj.bias" for n in "qkv")),
        "output": stacked("self_attn.o_proj.weight"),
        "gate_up": stacked("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": stacked("mlp.down_proj.weight"),
    }


def check_equal(params: Params, expected: dict[str, np.ndarray], dtype: Any = np.float32) -> None:
    leaves, _ = jax.tree.flatten_with_path(params)
    arrays = {path[-1].name: np.asarray(leaf) for path, leaf in leaves}
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == dtype, name
        np.testing.assert_array_equal(array, expected[name].astype(dtype), err_msg=name)


@pytest.mark.parametrize("piece", [1, 40, 2**24])
def test_every_tensor_lands_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int):
    monkeypatch.setattr(loader, "READ_PIECE", piece)
    tensors = weights()
    check_equal(load(write(tmp_path, tensors)), by_hand(tensors))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("loaded", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stored_types_become_the_models_type(tmp_path: Path, stored: Any, loaded: Any):
    tensors = weights(stored)
    check_equal(load(write(tmp_path, tensors), loaded), by_hand(tensors), loaded)


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_what_transformers_saves_is_loaded(tmp_path: Path, max_shard_size: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in CONFIG.items() if name != "architectures"}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields, pad_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "4KB")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    check_equal(load(tmp_path), by_hand(tensors))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, name: str):
    tensors = weights()
    del tensors[name]
    with pytest.raises(WeightsError, match=rf"no tensor '{name}'"):
        load(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (35, 16)),
        ("model.layers.2.self_attn.k_proj.weight", (16, 8)),  # transposed
        ("model.layers.0.self_attn.q_proj.bias", (16, 1)),
        ("model.layers.1.mlp.down_proj.weight", (320,)),
    ],
)
def test_a_wrong_shape_is_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...]):
    with pytest.raises(WeightsError) as caught:
        load(write(tmp_path, weights() | {name: np.zeros(shape, np.float32)}))
    assert f"tensor {name!r} has shape {shape}, the model's config asks for {SHAPES[name]}" in str(caught.value)


def test_a_tensor_that_a_layer_has_no_use_for_is_refused(tmp_path: Path):
    extra = {"model.layers.1.self_attn.o_proj.bias": np.zeros(16, np.float32)}
    with pytest.raises(
        WeightsError, match=r"'model\.layers\.1\.self_attn\.o_proj\.bias', which the model's config has no"
    ):
        load(write(tmp_path, weights() | extra))


def test_fewer_layers_than_the_checkpoint_has_may_be_taken(tmp_path: Path):
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    params = load(write(tmp_path, weights() | derived, num_hidden_layers=2))
    [segment] = params.layers
    assert segment.qkv is not None and segment.qkv.shape == (2, HEADS + 2 * KV, 16)


def test_tied_embeddings_leave_a_stored_head_alone(tmp_path: Path):
    assert load(write(tmp_path, weights(), tie_word_embeddings=True)).head is None


class CountingReader:
    """A checkpoint in memory that remembers what was read of it."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors
        self.rows: dict[str, int] = dict.fromkeys(tensors, 0)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        part = self._tensors[name][slice(None) if rows is None else rows]
        self.rows[name] += len(part)
        return part


def test_each_row_is_read_once():
    reader = CountingReader(weights())
    loader.load(reader, decoder_specs(model_config(CONFIG)), jnp.dtype(np.float32), DEVICE, progress=False)
    assert reader.rows == {name: shape[0] for name, shape in SHAPES.items()}


def test_nothing_is_read_of_a_checkpoint_that_does_not_fit():
    tensors = weights()
    del tensors["lm_head.weight"]  # the last that the check comes to
    reader = CountingReader(tensors)
    with pytest.raises(WeightsError):
        loader.load(reader, decoder_specs(model_config(CONFIG)), jnp.dtype(np.float32), DEVICE, progress=False)
    assert not any(reader.rows.values())


def test_reading_ends_when_nobody_wants_the_weights_any_more():
    stop = threading.Event()

    class StoppedReader(CountingReader):
        def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
            assert not stop.is_set()
            if name == "model.layers.1.self_attn.q_proj.weight":
                stop.set()
            return super().read(name, rows)

    reader, specs = StoppedReader(weights()), decoder_specs(model_config(CONFIG))
    with pytest.raises(CancelledError):
        loader.load(reader, specs, jnp.dtype(np.float32), DEVICE, progress=False, stop=stop)
    assert stop.is_set()
    with pytest.raises(CancelledError):
        loader.dummy(specs, jnp.dtype(np.float32), DEVICE, stop=stop)


def test_a_device_reads_only_its_rows():
    """Of four devices the third has the third head and, with its neighbour, the second KV head."""
    tensors = weights()
    reader = CountingReader(tensors)
    specs: Any = decoder_specs(model_config(CONFIG))
    [segment] = specs.layers
    [part] = loader.read_parts(reader, segment.qkv, [{TENSOR: 2}], {TENSOR: 4}, jnp.dtype(np.float32))
    whole = by_hand(tensors)["qkv"]
    np.testing.assert_array_equal(part, np.concatenate([whole[:, 8:12], whole[:, 20:24], whole[:, 28:32]], axis=1))
    read = {name: rows for name, rows in reader.rows.items() if rows}
    prefix = "model.layers.{}.self_attn.{}_proj.weight"
    assert read == {prefix.format(layer, part): 4 for layer in range(4) for part in "qkv"}


def test_dummy_weights_need_only_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "PIECE", 100)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(WeightsError, match=r"there is no \.safetensors file"):
        load(tmp_path)
    params = load(tmp_path, load_format="dummy")
    again = load(tmp_path, load_format="dummy")
    drawn = {}
    for (path, leaf), same in zip(jax.tree.flatten_with_path(params)[0], jax.tree.leaves(again), strict=True):
        values = drawn[path[-1].name] = np.asarray(leaf)
        np.testing.assert_array_equal(values, np.asarray(same))
        if "norm" in path[-1].name:
            assert (values == 1).all()
        else:
            assert 0.01 < values.std() < 0.03 and len(np.unique(values)) > 0.99 * values.size
    assert {name: array.shape for name, array in drawn.items()} == {
        name: array.shape for name, array in by_hand(weights()).items()
    }


def test_dummy_norms_of_gemma_change_nothing():
    gemma = {**CONFIG, "architectures": ["Gemma3ForCausalLM"], "head_dim": 8, "sliding_window": 8}
    params = loader.dummy(decoder_specs(model_config(gemma)), jnp.dtype(jnp.bfloat16), DEVICE)
    [segment] = params.layers
    assert not np.asarray(segment.post_mlp_norm).any() and not np.asarray(params.norm).any()


@pytest.mark.parametrize(
    ("files", "load_format", "error", "message"),
    [
        ({}, "auto", WeightsError, "there is no config.json"),
        ({"config.json": "{"}, "auto", WeightsError, "config.json: not readable JSON"),
        ({"config.json": "[]"}, "auto", WeightsError, "expected a JSON object, found list"),
        (
            {"config.json": "{}"},
            "pickle",
            ValidationError,
            "load_format must be auto, gguf, safetensors, pt, mistral, orbax, dummy",
        ),
        ({"config.json": "{}"}, "gguf", ValidationError, "load_format='gguf', but .* holds safetensors weights"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused(tmp_path: Path, files, load_format: str, error, message: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path, load_format)


@pytest.mark.parametrize(
    ("text", "head", "images"),
    [("language_model.model.", "language_model.lm_head.", ""), ("model.language_model.", "lm_head.", "model.")],
)
def test_the_text_of_a_model_that_sees_images(text: str, head: str, images: str, tmp_path: Path):
    """In the names of transformers before 4.52 and since."""
    tensors = weights()
    renamed = {
        name.replace("model.", text, 1) if name.startswith("model.") else name.replace("lm_head.", head): tensor
        for name, tensor in tensors.items()
    }
    # a layer of images has names like a layer of text
    renamed[f"{images}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = np.ones((2, 2), np.float32)
    renamed[f"{images}multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(2, np.float32)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(renamed, tmp_path / "model.safetensors")
    specs = decoder_specs(model_config(CONFIG))
    found = Checkpoint(tmp_path).load(specs, jnp.dtype(np.float32), DEVICE, seed=0, progress=False)
    np.testing.assert_array_equal(found.head, tensors["lm_head.weight"])
    [segment] = found.layers
    assert segment.down is not None
    np.testing.assert_array_equal(segment.down[3], tensors["model.layers.3.mlp.down_proj.weight"])
    Checkpoint(tmp_path).check(specs)
