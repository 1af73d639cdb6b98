"""Saved models: what is loaded back is what was saved, bit by bit, or an error."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import orbax

CONFIG = model_config(
    {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load(directory: Path, config: DecoderConfig = CONFIG, dtype: str = "bfloat16") -> Params:
    return orbax.load(directory, decoder_specs(config), jnp.dtype(dtype), DEVICE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    params = loader.dummy(decoder_specs(CONFIG), jnp.dtype(jnp.bfloat16), DEVICE, seed=5)
    directory = tmp_path_factory.mktemp("saved")
    orbax.save(directory, params, decoder_specs(CONFIG))
    return directory, params


def test_what_is_loaded_is_what_was_saved(saved: tuple[Path, Params]):
    directory, params = saved
    loaded = load(directory, CONFIG)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert after.dtype == jnp.bfloat16 and after.sharding == DEVICE
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_arrays_larger_than_a_chunk_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 1000)
    params = loader.dummy(decoder_specs(CONFIG), jnp.dtype(jnp.float32), DEVICE)
    orbax.save(tmp_path, params, decoder_specs(CONFIG))
    loaded = load(tmp_path, CONFIG, "float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_another_dtype_is_converted_to(saved: tuple[Path, Params]):
    directory, params = saved
    loaded = load(directory, CONFIG, "float32")
    assert loaded.embedding.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(loaded.embedding), np.asarray(params.embedding, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 98}, r"'embedding' has shape \(97, 32\), the model's config asks for \(98, 32\)"),
        ({"num_layers": 2}, r"'layers\.attention_norm' has shape \(3, 32\), the model's config asks for \(2, 32\)"),
        ({"tie_word_embeddings": False}, r"'head' has shape None, the model's config asks for \(97, 32\)"),
        ({"qk_norm": False}, r"'layers\.key_norm' has shape \(3, 8\), the model's config asks for None"),
    ],
)
def test_a_saved_model_of_another_shape_is_refused_by_name(saved: tuple[Path, Params], change, message: str):
    with pytest.raises(WeightsError, match=message):
        load(saved[0], dataclasses.replace(CONFIG, **change))


DAMAGED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_orbax import WeightsError, load
try:
    load(Path(sys.argv[2]))
except WeightsError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("cut", [0.0, 0.5])
def test_a_damaged_file_is_refused(saved: tuple[Path, Params], tmp_path: Path, cut: float):
    """In a process of its own: orbax leaves coroutines behind that warn whenever they are collected."""
    directory = tmp_path / "copy"
    shutil.copytree(saved[0], directory)
    files = [path for path in (directory / orbax.FOLDER).rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: int(largest.stat().st_size * cut)])
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", DAMAGED, str(here), str(directory)],
        env={**os.environ, "PYTHONPATH": str(here.parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout.startswith(f"refused: {directory / orbax.FOLDER}"), result.stderr
    assert "tensor" in result.stdout and "cannot be read" in result.stdout


def test_a_directory_without_a_saved_model_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="not a readable orbax checkpoint"):
        load(tmp_path, CONFIG)


def test_a_saved_model_is_not_overwritten(saved: tuple[Path, Params]):
    with pytest.raises(WeightsError, match="exists already"):
        orbax.save(*saved, decoder_specs(CONFIG))
