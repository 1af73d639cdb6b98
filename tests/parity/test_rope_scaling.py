"""Rotary embeddings beyond the length that a model was trained on, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel
from support.tiny_model import write_tiny_model

from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.models import whole_sequences
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.runner.compile.target import target_here
from jaxllm.startup.setup import read_setup
from jaxllm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEAD_DIM, TRAINED, LONG = 16, 32, 96
SHORT_FACTORS = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0]
LONG_FACTORS = [1.0, 1.2, 1.5, 2.0, 2.5, 2.8, 3.0, 3.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": TRAINED}


def fields(scaling: dict[str, Any], max_position_embeddings: int, theta: float = 500.0) -> dict[str, Any]:
    return {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_theta": theta, **scaling},
    }


@pytest.mark.parametrize(
    ("scaling", "max_position_embeddings", "max_model_len"),
    [
        pytest.param({"rope_type": "linear", "factor": 4.0}, 2048, None, id="linear"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, 2048, 2000, id="dynamic, not beyond"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, 2048, 3333, id="dynamic"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, 2048, None, id="dynamic, longest"),
        pytest.param({**YARN, "original_max_position_embeddings": 2048}, 2048, None, id="yarn"),
        pytest.param({"rope_type": "yarn", "factor": 4.0}, 2048, None, id="yarn, original left out"),
        pytest.param(
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
            8192,
            None,
            id="yarn, ratio",
        ),
        pytest.param({**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False}, 96, None, id="yarn, bounds"),
        pytest.param({**YARN, "attention_factor": 0.8}, 96, None, id="yarn, attention factor"),
        pytest.param({**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}, 96, None, id="yarn, mscale"),
        pytest.param({**YARN, "factor": 1.0}, 32, None, id="yarn, factor 1"),
        pytest.param({**LONGROPE, "original_max_position_embeddings": 512}, 4096, 512, id="longrope, short"),
        pytest.param({**LONGROPE, "original_max_position_embeddings": 512}, 4096, 513, id="longrope, long"),
        pytest.param(
            {**LONGROPE, "original_max_position_embeddings": 512, "factor": 2.0, "attention_factor": 1.25},
            4096,
            4096,
            id="longrope, factors",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers says what it thinks of such numbers
def test_frequencies_equal_transformers(
    scaling: dict[str, Any], max_position_embeddings: int, max_model_len: int | None
):
    given = fields(scaling, max_position_embeddings, theta=10000.0)
    ours = model_config({"architectures": ["LlamaForCausalLM"], **given}, max_model_len)
    theirs = transformers.LlamaConfig(**given)
    make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    length = max_model_len or ours.max_position_embeddings
    frequencies, scale = make(theirs, seq_len=length)
    np.testing.assert_allclose(ours.rope[0].inverse_frequencies, frequencies.numpy(), rtol=2e-6)
    assert ours.rope[0].scale == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize(
    ("scaling", "max_position_embeddings"),
    [
        pytest.param({**YARN, "beta_fast": 4}, LONG, id="yarn"),
        pytest.param({"rope_type": "dynamic", "factor": 3.0}, TRAINED, id="dynamic"),
        pytest.param({**LONGROPE, "original_max_position_embeddings": TRAINED}, LONG, id="longrope"),
    ],
)
def test_logits_beyond_the_original_length_equal_transformers(
    scaling: dict[str, Any], max_position_embeddings: int, tmp_path: Path
):
    given = transformers.LlamaConfig(**fields(scaling, max_position_embeddings), pad_token_id=None)
    given._attn_implementation = "eager"
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(given).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5 * (1.0 if weight.ndim > 1 else 4.0))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(1).integers(131, size=LONG)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()

    checkpoint = Checkpoint(tmp_path)
    config = model_config(checkpoint.config, LONG)
    plain = model_config({**checkpoint.config, "rope_parameters": {"rope_theta": 500.0}})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(decoder_specs(config), jnp.dtype("float32"), device, seed=0, progress=False)
    logits = jax.jit(whole_sequences.logits, static_argnums=0)
    scores, unscaled = (np.asarray(logits(kind, params, ids[None]))[0] for kind in (config, plain))
    assert np.abs(scores - expected).max() < 1e-4
    assert np.abs(unscaled - expected).max() > 1e-2, "the model does not look at positions"

    if scaling["rope_type"] == "yarn":  # over pages, in chunks that cross the original length
        paged = PagedModel(config, params, block_size=16, max_len=LONG, buckets=(64,), num_seqs=2)
        parts = [paged.step({"a": ids[first:end].tolist()})["a"] for first, end in ((0, 20), (20, 80), (80, 96))]
        assert np.abs(np.concatenate(parts) - expected).max() < 1e-4


def setup(folder: Path, overrides: dict[str, Any], max_model_len: int | None = None) -> Any:
    given = engine_args(model=folder, load_format="dummy", hf_overrides=overrides, max_model_len=max_model_len)
    return read_setup(given, folder).runner_config(target_here("cpu"), progress=None)


def test_an_engine_runs_what_the_scaling_allows(tmp_path: Path):
    """The tiny model was trained on 512 positions."""
    folder = write_tiny_model(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for overrides in (
        {"rope_scaling": yarn},
        # as in vLLM's example of a longer context
        {"rope_parameters": {"rope_theta": 10000.0, **yarn}, "max_model_len": 2048},
    ):
        assert setup(folder, overrides).scheduler.max_model_len == 2048
    assert setup(folder, {"rope_scaling": yarn}, 1024).scheduler.max_model_len == 1024
    with pytest.raises(ValidationError, match="max_model_len <= 2048"):
        setup(folder, {"rope_scaling": yarn}, 2049)
    assert setup(folder, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}).scheduler.max_model_len == 1024

    longrope = {"rope_scaling": {**LONGROPE}, "original_max_position_embeddings": 128}
    usual, long = setup(folder, longrope), setup(folder, longrope, 512)
    assert (usual.scheduler.max_model_len, long.scheduler.max_model_len) == (128, 512)
    assert usual.model.rope[0].inverse_frequencies > long.model.rope[0].inverse_frequencies


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "proportional"}, "'proportional' is not supported; supported: default, linear, dynamic, yarn"),
        ({"rope_type": "yarn", "factor": "4"}, "factor of rope_scaling must be a number above 0.*'4'"),
        ({"rope_type": "dynamic"}, "no field 'factor'"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor has 1 numbers; half a head, which it divides, has 8"),
    ],
)
def test_what_cannot_be_is_named(scaling: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        model_config({"architectures": ["LlamaForCausalLM"], **fields(scaling, TRAINED)})
