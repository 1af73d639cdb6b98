"""Which matrices of a checkpoint are quantized, and how: the rules of its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quantized_checkpoints import FORMATS, write
from support.stored_weights import DEVICE, F32, edited, load, rewritten, specs_of
from support.tiny_model import CONFIG

from jaxllm.config.engine_args import engine_args
from jaxllm.layers.context import Context
from jaxllm.layers.linear import linear_f32
from jaxllm.layers.weight import is_spec
from jaxllm.models.matrices import quantized
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import device_bytes
from jaxllm.startup.setup import read_setup
from jaxllm.weights.quantization.detect import METHODS
from pallas_kernels.quantized import dense


def test_one_matrix_may_be_left_out(tmp_path: Path):
    """Keys in 32 bits beside queries and values in four: the product is that of all three."""
    stored, plain = write(tmp_path, "packed 4 bits", left_out="k_proj")
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    one = jax.tree.map(lambda array: array[0], ours.layers[0].qkv)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    y = linear_f32(Context(), jnp.asarray(x), one)
    np.testing.assert_allclose(y, x @ np.asarray(whole.layers[0].qkv[0]).T, rtol=1e-5, atol=1e-5)


def test_layers_of_different_forms_are_segments(tmp_path: Path):
    stored, plain = write(tmp_path, "packed 4 bits", left_out="layers.1.mlp.down_proj")
    ours, whole = load(stored), load(plain)
    assert len(ours.layers) == 2
    for layer, segment in enumerate(ours.layers):
        np.testing.assert_array_equal(dense(segment.down, F32)[0], whole.layers[0].down[layer])


def test_modelopts_own_file_says_how_weights_are_stored(tmp_path: Path):
    """Also by modules that have the quantized ones in them."""
    stored, plain = write(tmp_path, "modelopt nvfp4")
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    layers = {f"model.layers.{i}.{part}": {"quant_algo": "NVFP4"} for i in range(2) for part in ("self_attn", "mlp")}
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (stored / "hf_quant_config.json").write_text(json.dumps(own))
    checkpoint, _ = specs_of(stored, load_format="dummy")
    assert checkpoint.quantization is None and checkpoint.kv_cache[0] == "fp8_e4m3"
    own["quantization"] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (stored / "hf_quant_config.json").write_text(json.dumps(own))
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].down, F32), whole.layers[0].down)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_rules_name_modules_as_the_checkpoint_does(tmp_path: Path, kind: str):
    """Of a model that sees images, whose text is ``model.language_model`` or ``language_model.model``."""
    if kind == "gptq":
        stored, plain = write(tmp_path, "gptq 4 bits")
        changes: dict[str, Any] = {
            "bits": 8,
            "dynamic": {r"+:model\.language_model\.layers\.\d+\.(self_attn|mlp)\..*": {"bits": 4}},
        }
    else:
        stored, plain = write(tmp_path, "packed 4 bits", left_out="k_proj")
        group = json.loads((stored / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        changes = {
            "config_groups": {"group_0": {**group, "targets": [r"re:language_model\.model\.layers\..*_proj$"]}},
            "ignore": ["re:.*lm_head", "language_model.model.layers.0.self_attn.k_proj", "re:.*1.self_attn.k_proj"],
        }
    rewritten(stored, **changes)
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_auto_rounds_expressions_leave_modules_out_in_awqs_layout_too(tmp_path: Path):
    stored, _ = write(tmp_path, "auto-round awq", left_out="k_proj")
    rewritten(stored, extra_config={".*k_proj.*": {"bits": 16}})
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


@pytest.mark.parametrize("name", ["gptq 4 bits", "auto-round", "auto-round awq"])
def test_groups_may_be_others_by_module(tmp_path: Path, name: str):
    stored, plain = write(tmp_path, name)
    rules = {"dynamic": {r"+:.*_proj$": {"group_size": "32"}}}
    if name != "gptq 4 bits":
        rules = {"extra_config": {".*_proj": {"group_size": 32}}}
    rewritten(stored, group_size=16, **rules)
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_auto_round_says_which_modules_differ(tmp_path: Path):
    stored, plain = write(tmp_path, "auto-round", left_out="k_proj")
    rules = {
        "model.layers.0.self_attn.k_proj": {"bits": 16},
        r".*layers\.1\.self_attn\.k_": {"bits": 16, "data_type": "float"},
        "q_proj": {"bits": 4, "group_size": 32},
    }
    # by the rules alone
    rewritten(stored, bits=8, extra_config={**rules, ".*(v|o|gate|up|down)_proj": {"bits": 4}})
    ours, whole = load(stored), load(plain)
    np.testing.assert_array_equal(dense(ours.layers[0].qkv, F32), whole.layers[0].qkv)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


@pytest.mark.parametrize(
    ("name", "backend"), [("gptq v2", "auto_round:exllamav2"), ("gptq 4 bits", "auto_round:gptq:exllamav2")]
)
def test_older_auto_rounds_name_a_backend_in_the_packings_place(tmp_path: Path, name: str, backend: str):
    """Its own kernels' files have zero points as they are, GPTQ's less one."""
    stored, plain = write(tmp_path, name)
    rewritten(stored, quant_method="intel/auto-round", backend=backend)
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)


@pytest.mark.parametrize(
    ("coarse", "fine"), [("re:.*_proj$", None), ("re:.*self_attn.*", "re:.*_proj$"), ("Linear", "re:.*_proj$")]
)
def test_the_first_word_is_the_one_that_compressed_tensors_takes(tmp_path: Path, coarse: str, fine: str | None):
    """Names before expressions, these in the order of their text, classes last, whichever group is the first."""
    stored, _ = write(tmp_path, "packed 4 bits")
    group = json.loads((stored / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    modules = [name.removesuffix(".weight") for name in specs_of(stored)[0].quantization.matrices]  # pyright: ignore
    other = {**group, "weights": {**group["weights"], "num_bits": 8}, "targets": [coarse]}
    rewritten(stored, config_groups={"a": other, "b": {**group, "targets": modules if fine is None else [fine]}})
    checkpoint, specs = specs_of(stored)
    checkpoint.check(specs)


def test_quark_leaves_out_by_regular_expressions_too(tmp_path: Path):
    stored, _ = write(tmp_path, "quark mxfp4", left_out="k_proj")
    rewritten(stored, exclude=["lm_head", "re:model.layers.*.self_attn.k_proj"])
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


@pytest.mark.parametrize("kind", ["modelopt", "auto-round", "compressed-tensors"])
def test_rules_of_many_modules_are_compiled_once(monkeypatch: pytest.MonkeyPatch, kind: str):
    """`re` keeps 512 of them, and one more made each look-up of a module compile all of them."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(600)]
    group = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    config: dict[str, Any] = {
        "modelopt": {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": dict.fromkeys(names, {"quant_algo": "NVFP4"}),
            "exclude_modules": [f"{name}.none" for name in names],
        },
        "auto-round": {"extra_config": dict.fromkeys(names, {"bits": 8})},
        "compressed-tensors": {"config_groups": {"a": {**group, "targets": [f"re:{name}$" for name in names]}}},
    }[kind]
    method = METHODS[kind](config)
    compiled: list[str] = []
    compiler = re._compiler  # pyright: ignore[reportAttributeAccessIssue]
    own = compiler.compile
    monkeypatch.setattr(compiler, "compile", lambda pattern, *args: compiled.append(pattern) or own(pattern, *args))
    assert all(method.planned(f"{name}.weight", (64, 256)) is not None for name in names[-3:])
    assert not compiled


def test_heads_that_a_checkpoint_quantizes_stay_so(tmp_path: Path):
    stored, _ = write(tmp_path, "gptq 4 bits", changes={"tie_word_embeddings": False})
    tensors, matrix = FORMATS["gptq 4 bits"][1](CONFIG["vocab_size"], CONFIG["hidden_size"], np.random.default_rng(9))
    edited(stored, **{"lm_head.weight": None}, **{f"lm_head.{end}": array for end, array in tensors.items()})
    rewritten(stored, lm_head=True)
    head = load(stored).head
    assert not isinstance(head, jax.Array)
    np.testing.assert_array_equal(dense(head, F32), matrix)
    assert device_bytes(specs_of(stored, load_format="dummy")[1], F32, {}) == device_bytes(specs_of(stored)[1], F32, {})


def test_a_quantized_head_of_a_model_without_one_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    stored, _ = write(tmp_path, "gptq 4 bits", changes={"tie_word_embeddings": True})
    args = {"quantization": None, "device": "cpu"}
    read_setup(engine_args(stored, **args), stored)
    assert not caplog.text
    tensors, matrix = FORMATS["gptq 4 bits"][1](CONFIG["vocab_size"], CONFIG["hidden_size"], np.random.default_rng(9))
    edited(stored, **{f"lm_head.{end}": array for end, array in tensors.items()})
    read_setup(engine_args(stored, **args), stored)
    assert "has lm_head.weight quantized, and it is not read" in caplog.text
    caplog.clear()
    # what it says takes it
    setup = read_setup(engine_args(stored, **args, hf_overrides={"tie_word_embeddings": False}), stored)
    assert not caplog.text and setup.checkpoint.quantization is not None
    specs = quantized(decoder_specs(model_config(setup.checkpoint.config)), setup.checkpoint.quantization.layout)
    head: Any = setup.checkpoint.load(specs, F32, DEVICE, seed=0, progress=False).head
    np.testing.assert_array_equal(dense(head, F32), matrix)


def test_aliases_are_one_method(tmp_path: Path):
    stored, _ = write(tmp_path, "gptq 4 bits")
    _, wanted = specs_of(stored)
    for alias in ("gptq", "auto_gptq", "gptq_marlin"):
        _, specs = specs_of(stored, alias)
        assert jax.tree.leaves(specs, is_leaf=is_spec) == jax.tree.leaves(wanted, is_leaf=is_spec)
