"""Quantized checkpoints that are broken, contradict what was asked, or are of a format that cannot be read: each is
refused by its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.quantized_checkpoints import FORMATS, write
from support.stored_weights import F32, edited, load, rewritten, specs_of
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm.api.errors import ValidationError
from jaxllm.config import quantization as names
from jaxllm.layers.weight_storage import Int4Layout
from jaxllm.models.matrices import quantized
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import SINGLE, TensorFiles
from jaxllm.weights.quantization.awq import AWQ
from jaxllm.weights.quantization.detect import ALIASES, METHODS, ONLINE, REFUSED
from pallas_kernels.quantized import dense


def test_every_name_is_taken_or_refused_with_what_to_take():
    assert {*METHODS, *ONLINE, "gguf"} == set(names.METHODS)
    assert (set(ALIASES), set(REFUSED)) == (set(names.ALIASES), set(names.REFUSED))
    assert len(set(names.NAMES)) == len(names.NAMES)


#: the module of a matrix
Q = "model.layers.0.self_attn.q_proj"

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {f"{Q}.scales": None}, r"no tensor 'model.layers.0.self_attn.q_proj.scales'"),
    ("awq", {f"{Q}.qzeros": np.zeros((2, 7), np.int32)}, r"q_proj.qzeros' has shape \(2, 7\).*\[2, 8\]"),
    (
        "awq",
        {f"{Q}.scales": np.zeros((3, 64), np.float16), f"{Q}.qzeros": np.zeros((3, 8), np.int32)},
        r"qweight' has shape \(64, 8\) and .*scales' has shape \(3, 64\): 3 groups, which do not divide .* 64 columns",
    ),
    (
        "awq",
        {f"{Q}.qweight": np.zeros((63, 8), np.int32)},
        r"q_proj.qweight' has shape \(63, 8\) and .*q_proj.scales' has shape \(2, 64\): 2 groups.* 63 columns.*=32",
    ),
    (
        "awq",
        {f"{Q}.qweight": np.zeros((64, 7), np.int32)},
        r"q_proj.qweight' has shape \(64, 7\) and .*q_proj.scales' has shape \(2, 64\): .* 56 rows, .* 64$",
    ),
    (
        "gptq 4 bits",
        {f"{Q}.qweight": np.zeros((7, 64), np.int32)},
        r"q_proj.qweight' has shape \(7, 64\) and .*q_proj.scales' has shape \(2, 64\): 2 groups of 28 of .*=32",
    ),
    (
        "gptq 4 bits",
        {f"{Q}.qweight": np.zeros((8, 32), np.int32)},
        r"q_proj.qweight' has shape \(8, 32\) and .*q_proj.scales' has shape \(2, 64\): .* 32 rows, .* 64$",
    ),
    ("awq", {f"{Q}.qweight": None}, "no tensor '.*q_proj.qweight', which '.*q_proj.qzeros' needs"),
    ("gptq act-order", {f"{Q}.qweight": None}, "no tensor '.*q_proj.qweight', which '.*q_proj.qzeros' needs"),
    ("gptq 4 bits", {f"{Q}.g_idx": np.zeros(64, np.int32)}, "g_idx' must give each of the 2 groups 32"),
    ("fp8 static", {f"{Q}.input_scale": None}, r"no tensor '.*q_proj.input_scale'"),
    ("fp8 blocks", {f"{Q}.weight_scale_inv": np.ones((1, 2), np.float32)}, r"weight_scale_inv' has shape \(1, 2\)"),
    ("packed 4 bits", {f"{Q}.weight_packed": np.zeros((64, 9), np.int32)}, "weight_packed' has 9 words a row.* 8"),
    ("int8", {f"{Q}.weight_scale": np.ones((63, 1), np.float32)}, r"weight_scale' has shape \(63, 1\)"),
    ("packed 4 bits", {f"{Q}.weight_scale": None}, r"no tensor '.*q_proj.weight_scale', which '.*weight_packed' needs"),
    ("float8", {f"{Q}.weight_scale": None}, r"no tensor '.*q_proj.weight_scale', which '.*q_proj.weight' needs"),
    ("fp8 rows", {f"{Q}.weight_scale": None}, r"no tensor '.*_inv' or '.*q_proj.weight_scale', which '.*weight' needs"),
    ("bitsandbytes int8", {f"{Q}.SCB": None}, r"no tensor .*'.*q_proj.SCB'.*, which '.*q_proj.weight' needs"),
    ("quark uint4 in groups", {f"{Q}.weight_zero_point": None}, r"no tensor '.*q_proj.weight_zero_point'"),
    ("quark uint4 in groups", {f"{Q}.weight_scale": np.ones((3, 64), np.float16)}, r"shape \(3, 64\), and .* 2 groups"),
    ("int8", {f"{Q}.weight": np.zeros((64, 64), np.uint8)}, "q_proj.weight' has type U8, and by its scheme it is I8"),
    ("packed 4 bits", {f"{Q}.weight_g_idx": np.zeros(64, np.int32)}, "weight_g_idx' must give each of the 2 groups 32"),
    ("nvfp4", {f"{Q}.weight_global_scale": None}, "no tensor '.*q_proj.weight_global_scale'"),
    ("nvfp4", {f"{Q}.weight_scale": np.zeros((64, 4), np.uint8)}, "weight_scale' has type U8, F8_E4M3 is known"),
    ("dense mxfp4", {f"{Q}.weight_scale": np.zeros((64, 3), np.uint8)}, r"weight_scale' has shape \(64, 3\)"),
    ("nf4", {f"{Q}.weight.quant_map": np.zeros(15, np.float32)}, r"quant_map' has shape \(15,\)"),
    ("bitsandbytes int8", {f"{Q}.SCB": np.zeros(3, np.float32)}, r"SCB' has shape \(3,\)"),
]


@pytest.mark.parametrize(("name", "change", "text"), BROKEN)
def test_broken_tensors_are_refused_by_name(tmp_path: Path, name: str, change: dict[str, Any], text: str):
    stored, _ = write(tmp_path, name)
    with pytest.raises(WeightsError, match=text):
        load(edited(stored, **change))


@pytest.mark.parametrize("name", ["awq", "gptq 4 bits", "gptq 8 bits", "gptq act-order", "auto-round awq"])
@pytest.mark.parametrize("said", [100, 64, 16, 0, -1, "128", None])
def test_a_group_size_that_the_tensors_have_not_is_refused_with_both(tmp_path: Path, name: str, said: int | str | None):
    """None: there is none in config.json, which is 128."""
    stored, _ = write(tmp_path, name)
    # the first matrix has 64 columns, of which a larger group would be all
    first = next(iter(specs_of(stored)[0].quantization.matrices))  # pyright: ignore[reportOptionalMemberAccess]
    rewritten(stored, group_size=said)
    if said is None:
        config = json.loads((stored / "config.json").read_text())
        del config["quantization_config"]["group_size"]
        (stored / "config.json").write_text(json.dumps(config))
    named = (
        f"tensor '{first.removesuffix('.weight')}.qweight' .* of 32 of .*says group_size={said or 128 * (said is None)}"
    )
    with pytest.raises(WeightsError, match=named):
        load(stored)


def _write_zeros(folder: Path, *, columns: int, groups: int) -> None:
    """A matrix ``m`` of AWQ with 64 rows."""
    words = {"m.qweight": np.zeros((columns, 8), np.int32), "m.qzeros": np.zeros((groups, 8), np.int32)}
    save_file({**words, "m.scales": np.zeros((groups, 64), np.float16)}, folder / SINGLE)


@pytest.mark.parametrize("said", [64, 65, 128, -1])
def test_one_group_may_be_a_whole_row(tmp_path: Path, said: int):
    _write_zeros(tmp_path, columns=64, groups=1)
    method = AWQ({"group_size": said})
    with TensorFiles(tmp_path) as files:
        assert method.find(files)["m.weight"].layout == method.planned("m.weight", (64, 64))
        with pytest.raises(WeightsError, match=r"1 groups of 64 of .* 64 columns, and .* says group_size=32\. Correct"):
            AWQ({"group_size": 32}).find(files)
        with pytest.raises(WeightsError, match=r"says group_size=48"):
            AWQ({"group_size": 48}).find(files)


def test_a_last_group_that_is_not_full_is_refused(tmp_path: Path):
    """Of 96 columns two groups of 64 are no two of 48."""
    _write_zeros(tmp_path, columns=96, groups=2)
    with TensorFiles(tmp_path) as files, pytest.raises(WeightsError, match=r"=64 \(the last group would not be full"):
        AWQ({"group_size": 64}).find(files)


def test_a_group_size_may_be_a_string_and_is_never_no_number(tmp_path: Path):
    stored, plain = write(tmp_path, "gptq 4 bits")
    rewritten(stored, group_size="32")
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)
    for wrong in ("all", True, [32], 32.5):
        with pytest.raises(ValidationError, match=r"says group_size=.*; it must be a number of columns, or -1"):
            load(rewritten(stored, group_size=wrong))


def test_a_plan_refuses_groups_that_do_not_divide_a_matrix(tmp_path: Path):
    """The configuration alone."""
    stored, _ = write(tmp_path, "awq")
    for wrong in (0, 1, 48, -2):
        rewritten(stored, group_size=wrong)
        with pytest.raises(ValidationError, match=f"group_size={wrong}, and model.layers.0.* has 64 columns"):
            specs_of(stored, load_format="dummy")


def test_bits_that_the_tensors_have_not_are_refused_with_both(tmp_path: Path):
    stored, _ = write(tmp_path, "gptq 4 bits")
    for wrong in (2, 3, 8):
        rewritten(stored, bits=wrong)
        with pytest.raises(WeightsError, match=rf"_proj.qzeros' has shape .* these are 4 bits, .* says bits={wrong}"):
            load(stored)


@pytest.mark.parametrize("asked", [None, "int8"])
@pytest.mark.parametrize(("name", "end"), [("awq", "qweight"), ("packed 4 bits", "weight_packed")])
def test_packed_tensors_without_a_configuration_are_named(tmp_path: Path, name: str, end: str, asked: str | None):
    stored, _ = write(tmp_path, name)
    (stored / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        WeightsError, match=rf"a packed one, '.*_proj.{end}', and its config.json has no quantization_c"
    ):
        load(stored, asked)


@pytest.mark.parametrize(
    ("name", "end", "value"),
    [
        ("awq", "scales", np.nan),
        ("gptq act-order", "scales", np.inf),
        ("fp8 static", "weight_scale", np.nan),
        ("fp8 static", "input_scale", np.nan),
        ("fp8 blocks", "weight_scale_inv", np.nan),
        ("int8", "weight_scale", -np.inf),
        ("nvfp4", "weight_scale", np.nan),
        ("nvfp4", "weight_global_scale", np.nan),
        ("dense mxfp4", "weight_scale", 255),
        ("nf4", "weight.nested_absmax", np.nan),
    ],
)
def test_scales_that_are_no_numbers_are_refused_by_name(tmp_path: Path, name: str, end: str, value: float):
    stored, _ = write(tmp_path, name)
    with TensorFiles(stored) as files:
        scales = files.raw(f"{Q}.{end}").copy()
    scales.reshape(-1)[-1] = value
    with pytest.raises(WeightsError, match=f"tensor '{Q}.{end}' has scales that are infinite or no numbers"):
        load(edited(stored, **{f"{Q}.{end}": scales}))


REFUSALS: list[tuple[str | None, dict[str, Any] | None, str]] = [
    ("gptq", {"quant_method": "awq"}, "'gptq', but the checkpoint is quantized by 'awq'"),
    ("int8", {"quant_method": "fp8"}, "'int8', but the checkpoint is quantized by 'fp8'"),
    ("awq", None, "'awq', but the checkpoint is not quantized.*'int8', 'fp8', 'int4'"),
    ("aqlm", None, "'aqlm' is not supported: take an AWQ"),
    ("marlin", {"quant_method": "awq"}, "'marlin' is not supported: the checkpoint is quantized by 'awq'.*Leave"),
    ("marlin", {"quant_method": "marlin"}, "'marlin' is not supported: .*take the GPTQ checkpoint"),
    ("gguf", None, "is no .gguf file"),
    (None, {"quant_method": "hqq"}, "quantized by 'hqq', which is not supported: take the model in 16 bits"),
    (None, {"quant_method": "new"}, "quantized by 'new', which is not supported: what can be read: awq"),
    (None, {"quant_method": "awq", "version": "GEMV"}, "version='gemv'; known are 'gemm'"),
    (None, {"quant_method": "awq", "checkpoint_format": "gemv_fast"}, "version='gemv_fast'; known are 'gemm'"),
    (None, {"quant_method": "gptq", "bits": 5}, "bits=5; known are 2, 3, 4, 8"),
    (
        None,
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        "checkpoint_format='marlin'; known are 'gptq'",
    ),
    (None, {"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24'; known are"),
    (
        None,
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse weights.*take a checkpoint of the same model without",
    ),
    (
        None,
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "has transforms of inputs.*take a checkpoint of the same model without",
    ),
    (None, {"quant_method": "exl2", "bits": 4.0}, "quantized by 'exl2', .*: take the model in 16 bits with"),
    (None, {"quant_method": "auto-round", "bits": 4, "data_type": "mx_int"}, "data_type='mx_int'; known are 'int'"),
    (None, {"quant_method": "auto-round", "bits": 8, "data_type": "fp8_e5m2", "fmt": "e5m2"}, "fmt='e5m2'; known are"),
    (
        None,
        {"quant_method": "auto-round", "bits": 8, "data_type": "fp", "group_size": 64},
        "group_size=64; known are -1",
    ),
    (None, {"quant_method": "auto-round", "bits": 4, "spinquant_config": {"r1": True}}, "rotations of inputs"),
    (
        "modelopt_fp4",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "'modelopt_fp4', but the .* by 'modelopt', FP8,",
    ),
    ("awq_marlin", {"quant_method": "gptq"}, "'awq_marlin', but the checkpoint is quantized by 'gptq'"),
    (
        None,
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8"},
        "packing_format='auto_round:fp8'; known",
    ),
    (
        None,
        {
            **{"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            **{"bits": 4, "extra_config": {"lm_head": {"bits": 8}}},
        },
        "8 bits in AWQ's layout, which has four: take .*'auto_round:auto_gptq'",
    ),
    (None, {"quant_method": "gptq", "dynamic": {"-:*k_proj": {}}}, r"'\*k_proj', which is no regular expression"),
    (None, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'; known are 'FP8'"),
    (
        None,
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}},
        "quant_algo of a='X'; known",
    ),
    (
        None,
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "uint8"}}},
        "dtype='uint8'; known are 'fp8_e4m3', 'int8', 'fp4'",
    ),
    (
        None,
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_channel"}}},
        "qscheme='per_channel'; known are 'per_group'",
    ),
    (None, {"quant_method": "quark", "export": {"weight_format": "fake_quantized"}}, "such weights are floats"),
    ("awq", {"quant_method": "quark"}, "'awq', but the checkpoint is quantized by 'quark'"),
]


@pytest.mark.parametrize(("asked", "config", "text"), REFUSALS)
def test_contradictions_are_refused_with_both_names(
    tmp_path: Path, asked: str | None, config: dict[str, Any] | None, text: str
):
    folder = write_tiny_model(tmp_path)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    with pytest.raises(ValidationError, match=text):
        specs_of(folder, asked)


def test_mlx_checkpoints_are_refused_by_name(tmp_path: Path):
    own = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization": own, "quantization_config": own}))
    with pytest.raises(ValidationError, match="quantized by 'mlx', which is not supported: take the model in 16 bits"):
        specs_of(tmp_path)


def test_a_quantized_tower_is_refused_where_it_is_read(tmp_path: Path):
    stored, plain = write(tmp_path, "awq")
    tensors, _ = FORMATS["awq"][1](64, 64, np.random.default_rng(5))
    edited(stored, **{f"visual.blocks.0.mlp.up_proj.{end}": array for end, array in tensors.items()})
    np.testing.assert_array_equal(dense(load(stored).layers[0].qkv, F32), load(plain).layers[0].qkv)
    with pytest.raises(ValidationError, match=r"visual.blocks.0.mlp.up_proj.weight quantized.*limit_mm_per_prompt="):
        Checkpoint(stored).quantize(None, (), prefix="model.", sees=True)


def test_a_checkpoint_that_is_not_what_its_config_says(tmp_path: Path):
    folder = write_tiny_model(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeightsError, match="quantized by 'gptq', and no tensor's name ends in .qweight"):
        specs_of(folder)


def test_an_integer_tensor_is_no_weight_by_itself(tmp_path: Path):
    folder = write_tiny_model(tmp_path)
    edited(folder, **{f"{Q}.weight": np.zeros((64, 64), np.int8)})
    with pytest.raises(WeightsError, match="type I8.*quantization_config"):
        load(folder)


def test_experts_of_a_layer_that_differ_are_refused():
    model = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 1}
    form = Int4Layout(group=32, scale_dtype="float16")
    with pytest.raises(ValidationError, match="experts of layer 0 are quantized in different ways"):
        quantized(decoder_specs(model_config(model)), lambda name: form if "experts.0." in name else None)
