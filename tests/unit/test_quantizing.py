"""Quantizing a model: the solvers against their formulas, layers that are scaled, and the files that are written."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.quantized_checkpoints import FORMATS, write
from support.stored_weights import DEVICE, F32, load, specs_of
from support.tiny_model import CONFIG, write_tiny_model

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.cli import main
from jaxllm.layers.weight import is_spec
from jaxllm.models import whole_sequences
from jaxllm.models.matrices import matrices
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.quantizing import api, awq, gptq
from jaxllm.quantizing.grid import Grid
from jaxllm.quantizing.inputs import row_errors
from jaxllm.quantizing.model_layers import ModelLayers, is_matrix, leaf_name
from jaxllm.quantizing.report import QuantizationReport
from jaxllm.quantizing.scaling import links, scale_layer
from jaxllm.quantizing.scheme import Scheme
from jaxllm.quantizing.text import read_samples
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights import saved_model
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import TensorFiles

ROWS, COLUMNS, GROUP = 24, 64, 16
FEW = {"num_samples": 4, "sequence_length": 64, "progress": False}


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix, inputs that go together, some of them large, and their products with each other."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((200, COLUMNS // 4)) @ random.standard_normal((COLUMNS // 4, COLUMNS))
    inputs = (mixed + 0.3 * random.standard_normal(mixed.shape)) * np.exp(random.standard_normal(COLUMNS))
    matrix = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return matrix, inputs.astype(np.float32), (inputs.T @ inputs).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_the_papers_algorithm(symmetric: bool):
    grid = Grid(bits=4, group=GROUP, symmetric=symmetric)
    matrix, _, gram = problem(0)
    found, order = gptq.gptq(grid, jnp.asarray(matrix), jnp.asarray(gram), act_order=False)
    assert order is None
    # column by column, in float64, with what the paper calls Q, E and the Cholesky factor of the inverse
    damped = gram + 0.01 * np.diagonal(gram).mean() * np.eye(COLUMNS)
    factor = np.linalg.cholesky(np.linalg.inv(damped.astype(np.float64))).T
    rest, want = matrix.astype(np.float64).copy(), np.zeros_like(matrix)
    for column in range(COLUMNS):
        if column % GROUP == 0:
            scales, zeros = (np.asarray(a) for a in grid.fit(jnp.asarray(rest[:, column : column + GROUP], F32)))
        codes = np.clip(np.rint(rest[:, column] / scales) + zeros, 0, 15)
        want[:, column] = (codes - zeros) * scales
        error = (rest[:, column] - want[:, column]) / factor[column, column]
        rest[:, column:] -= error[:, None] * factor[column, column:]
    own = np.asarray(found.matrix())
    plain = np.asarray(grid.round(jnp.asarray(matrix)).matrix())
    errors = [np.einsum("ni,ij,nj->n", d - matrix, gram, d - matrix) for d in (want, plain)]
    better = errors[0] <= errors[1]
    assert better.mean() > 0.7
    # a number in the middle of two codes may fall to either side
    assert (np.abs(own - want)[better] < 1e-5).mean() > 0.98
    np.testing.assert_array_equal(own[~better], plain[~better])


@settings(max_examples=12)
@given(seed=st.integers(0, 2**20), symmetric=st.booleans(), act_order=st.booleans())
def test_gptq_is_not_worse_than_rounding(seed: int, symmetric: bool, act_order: bool):
    grid = Grid(bits=4, group=GROUP, symmetric=symmetric, least_zero=1)
    matrix, inputs, gram = problem(seed)
    found, order = gptq.gptq(grid, jnp.asarray(matrix), jnp.asarray(gram), act_order=act_order)
    own, plain = np.asarray(found.matrix()), np.asarray(grid.round(jnp.asarray(matrix)).matrix())
    if order is not None:
        assert (np.diff(order.reshape(-1, GROUP), axis=1) > 0).all()
        own = own[:, np.argsort(order)]
    errors = [np.square((each - matrix) @ inputs.T).sum() for each in (own, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert float(found.zeros.min()) >= 1 and float(found.codes.max()) <= 15


@settings(max_examples=12)
@given(seed=st.integers(0, 2**20), symmetric=st.booleans())
def test_awq_is_not_worse_than_rounding(seed: int, symmetric: bool):
    grid = Grid(bits=4, group=GROUP, symmetric=symmetric)
    matrix, inputs, gram = problem(seed)
    whole, both = jnp.asarray(matrix), jnp.asarray(gram)
    scales = awq.column_scales(grid, [whole], [both], jnp.abs(jnp.asarray(inputs)).sum(axis=0))
    scaled = grid.round(whole * scales).matrix() / scales
    clipped = awq.clipped(grid, whole, both).matrix()
    plain = grid.round(whole).matrix()
    errors = [np.asarray(row_errors(each - whole, both), np.float64) for each in (scaled, clipped, plain)]
    assert errors[0].sum() <= errors[2].sum() * (1 + 1e-5)
    assert (errors[1] <= errors[2] * (1 + 1e-5)).all()
    # the inputs differ much in size
    assert min(errors[0].sum(), errors[1].sum()) < 0.95 * errors[2].sum()


#: with biases and shared values; with an offset of norms; with LayerNorm, no gate, and queries, keys and values in one
#: tensor
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "GPTNeoX": {},
}


def write_family(folder: Path, family: str, **fields: Any) -> Path:
    """A tiny random model of a family, all of whose weights are drawn, norms and biases, too."""
    config = {**CONFIG, **FAMILIES.get(family, {}), **fields, "architectures": [f"{family}ForCausalLM"]}
    random = np.random.default_rng(0)
    tensors = {
        name: (random.standard_normal(part.tensor_shape) / part.shape[-1] ** 0.5 + (len(part.shape) == 1)).astype("f4")
        for spec in jax.tree.leaves(decoder_specs(model_config(config)), is_leaf=is_spec)
        for name, part in spec.tensors()
    }
    write_tiny_model(folder)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_matrices_are_told_by_their_names_in_a_layer_whatever_layers_are_called(tmp_path: Path):
    report = jaxllm.quantize(write_family(tmp_path, "Falcon"), tmp_path / "int8", method="int8", progress=False)
    names = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    assert [error.matrix for error in report.errors if error.layer == 1] == names


def test_what_is_written_calls_the_head_as_the_model_does(tmp_path: Path):
    checkpoint = Checkpoint(write_family(tmp_path, "GPTNeoX"))
    layers = ModelLayers(checkpoint, model_config(checkpoint.config), "float32")
    for method, field in (("int8", "ignore"), ("awq", "modules_to_not_convert")):
        scheme = Scheme(method=method, group_size=None if method == "int8" else 32, ignore=("lm_head",))
        assert api._forms(scheme, layers).config[field] == ["embed_out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaled_layer_computes_what_it_did(tmp_path: Path, family: str):
    checkpoint = Checkpoint(write_family(tmp_path, family))
    layers = ModelLayers(checkpoint, model_config(checkpoint.config), "float32")
    weights, grid = layers.read(1), Grid(bits=4, group=16, symmetric=False)
    hidden = [jnp.asarray(np.random.default_rng(1).standard_normal((24, 64)), F32)]
    inputs = layers.observe(1, weights, hidden)
    grids = dict.fromkeys((name for name in inputs if "." not in name), grid)
    scaled, scales = scale_layer(layers.config, grids, weights, inputs, F32)
    assert set(scales.columns) == {name for link in links(layers.config) for name in link.matrices}
    assert all(float(jnp.abs(own - 1).max()) > 0.01 for own in scales.columns.values())

    def one(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        name = leaf_name(path)
        return jnp.asarray(scales.scaled(name, np.asarray(array)[0]))[None] if is_matrix(path) else array

    (before,), (after,) = (layers.run(1, each, hidden) for each in (weights, jax.tree.map_with_path(one, scaled)))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


AUTO_ROUND_FLOATS = ("auto-round mx", "auto-round nv")
#: formats that are read alone
READ_ALONE = ("fp8", "nf4", "bits", "nvfp4", "dense mxfp4", "mxfp8", "modelopt", "quark", *AUTO_ROUND_FLOATS)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(READ_ALONE)])
def test_what_is_written_is_what_was_read(tmp_path: Path, name: str):
    """Against files of a packer that shares no code with ours."""
    stored, _ = write(tmp_path, name)
    checkpoint, _ = specs_of(stored)
    quantization = checkpoint.quantization
    assert quantization is not None
    with TensorFiles(stored) as files, checkpoint.tensors() as tensors:
        for matrix, found in quantization.matrices.items():
            arrays = {
                kind: quantization.method.array(tensors, matrix, found, kind, slice(None), None)
                for kind in found.layout.shapes(*found.shape)
            }
            written = quantization.method.written(matrix, found, arrays)
            stem = matrix.removesuffix("weight")
            own = {name for name in files.names() if name.startswith(stem)}
            assert own == set(written)
            for tensor, array in written.items():
                np.testing.assert_array_equal(array, files.raw(tensor), err_msg=tensor)
                assert array.dtype == files.raw(tensor).dtype


def perplexity(folder: Path, text: Path) -> float:
    """Of the text that is held out, by the whole model."""
    tokenizer = load_tokenizer(folder)
    held = read_samples(text, tokenizer, length=64, count=1, seed=0).held_out
    score = jax.jit(lambda params, tokens: whole_sequences.token_logprobs(config, params, tokens))
    config = model_config(Checkpoint(folder).config)
    return math.exp(-float(score(load(folder), jnp.asarray(held, jnp.int32)).mean()))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8 rows", "awq", "gptq act-order", "packed 3 bits", "int8 in files"])
def test_quantized_weights_are_saved_bit_for_bit(tiny_model: Path, tmp_path: Path, name: str):
    if name in ("int8", "fp8"):
        checkpoint, specs = specs_of(tiny_model, name)
    else:
        checkpoint, specs = specs_of(write(tmp_path, name.removesuffix(" in files"), left_out="k_proj")[0])
    params = checkpoint.load(specs, F32, DEVICE, seed=0, progress=False)
    save(tmp_path / "saved", checkpoint, specs, params)
    again, own = specs_of(tmp_path / "saved")
    assert own == specs
    for one, other in zip(
        jax.tree.leaves(again.load(own, F32, DEVICE, seed=0, progress=False)), jax.tree.leaves(params), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(("name", "why"), [("nf4", "bitsandbytes"), ("fp8 static", "scales of the checkpoint's")])
def test_what_has_no_form_is_not_saved(tmp_path: Path, name: str, why: str):
    checkpoint, specs = specs_of(write(tmp_path, name)[0])
    params = checkpoint.load(specs, F32, DEVICE, seed=0, progress=False)
    with pytest.raises(ValidationError, match="which no format that is written holds") as refused:
        save(tmp_path / "saved", checkpoint, specs, params)
    assert why in str(refused.value) and "Copy the checkpoint" in str(refused.value)
    assert not (tmp_path / "saved").exists()


def save(folder: Path, checkpoint: Checkpoint, specs: Any, params: Any) -> None:
    saved_model.save(
        folder,
        params,
        format="safetensors",
        model=model_config(checkpoint.config),
        specs=specs,
        quantization=checkpoint.quantization,
        config=checkpoint.config,
        files={},
        tokenizer=None,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sequences of 64 bytes."""
    lines = [{"text": "".join(chr(97 + (i * j + j * j) % 26) for j in range(62))} for i in range(1, 13)]
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_a_file_is_what_is_quantized_while_it_is_read(tiny_model: Path, tmp_path: Path, method: str):
    # the head, which recipes name, is left out in any case
    report = jaxllm.quantize(
        tiny_model, tmp_path / "out", method=method, ignore=["lm_head"], perplexity=False, progress=False
    )
    assert str(report).count(f" {report.errors[0].error:.2%}") and "(" not in str(report).partition("weights")[0]
    files, online = jax.tree.leaves(load(tmp_path / "out")), jax.tree.leaves(load(tiny_model, method))
    for one, other in zip(map(np.asarray, files), map(np.asarray, online), strict=True):
        if one.dtype != other.dtype:
            # a file has the scales of rows in bfloat16, and so some codes that lie beside the others
            assert one.dtype == jnp.bfloat16
            np.testing.assert_allclose(one.astype(np.float32), other, rtol=2**-8)
        elif one.dtype == np.int8:
            assert np.abs(one.astype(np.int16) - other).max() <= 1
        elif one.dtype == jnp.float8_e4m3fn:
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2**-3, atol=2**-9)
        else:
            assert one.tobytes() == other.tobytes()
    # of config.json alone
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.json").write_bytes((tmp_path / "out" / "config.json").read_bytes())
    plan = jaxllm.plan(tmp_path / "plan", device="cpu", dtype="float32", max_model_len=128, max_num_seqs=4)
    assert plan.memory.weight_bytes == sum(array.nbytes for array in files)
    assert not report.of_products and report.perplexity_before is None
    assert all(error.error == error.nearest > 0 for error in report.errors)
    assert report.bytes_after < 0.6 * report.bytes_before


@pytest.fixture(scope="module")
def reports(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizationReport]:
    folder = tmp_path_factory.mktemp("quantized")
    asked: dict[str, dict[str, Any]] = {
        "awq": {},
        "gptq": {"desc_act": True, "bits": 8, "symmetric": False, "ignore": ["re:.*k_proj"]},
    }
    return {
        name: jaxllm.quantize(tiny_model, folder / name, method=name, calibration=text, **FEW, **more)
        for name, more in asked.items()
    }


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_report_says_what_the_files_do(reports: dict[str, QuantizationReport], text: Path, name: str):
    report = reports[name]
    assert report.perplexity_after == pytest.approx(perplexity(report.output, text), rel=2e-3)
    assert all(0 < error.error < error.nearest for error in report.errors)
    matrices_of = {error.matrix for error in report.errors}
    assert ("self_attn.k_proj" in matrices_of) == (name == "awq") and "mlp.down_proj" in matrices_of
    config = json.loads((report.output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"]) == (name, {"awq": 4, "gptq": 8}[name])
    shown = str(report)
    assert "layer" in shown and "perplexity" in shown and f"{report.errors[0].error:.2%}" in shown


def test_what_is_left_out_stays_as_it_is(reports: dict[str, QuantizationReport], tiny_model: Path):
    with TensorFiles(tiny_model) as before, TensorFiles(reports["gptq"].output) as after:
        same = [name for name in before.names() if name in after.names()]
        assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"} <= set(same)
        for name in same:
            np.testing.assert_array_equal(before.read(name), after.read(name))
    checkpoint, _ = specs_of(reports["gptq"].output)
    planned = {name: shape for name, shape, _ in matrices(decoder_specs(model_config(checkpoint.config)))}
    assert checkpoint.quantization is not None
    method = checkpoint.quantization.method
    assert {name for name, shape in planned.items() if method.planned(name, shape)} == {
        name for name in planned if "k_proj" not in name and "lm_head" not in name
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "gguf"}, "method must be awq, gptq, int8, fp8, int4"),
        ({"method": "awq", "bits": 3}, "'awq' has 4 bits; got 3; method='gptq' has 2, 3, 4 and 8"),
        ({"method": "int8", "group_size": 64}, "'int8' has a scale a row, and no groups"),
        ({"method": "awq", "group_size": 48}, "48 do not divide the 64 columns of model.layers.0.self_attn.q_proj"),
        ({"method": "awq", "group_size": 48}, "group_size=64 divides all"),
        ({"method": "int4", "desc_act": True}, "desc_act is GPTQ's order of columns"),
        ({"method": "int4", "ignore": ["lm_haed"]}, "'lm_haed' is none of the model's matrices, such as 'model.layers"),
        ({"method": "fp8", "symmetric": False}, "'fp8' is symmetric"),
        ({"method": "gptq", "num_samples": 0}, "num_samples must be at least 1"),
        (
            {"method": "gptq", "sequence_length": 4096},
            "4096 is more than the 512 tokens that the model sees: set it to at most 512",
        ),
        ({"method": "gptq", "calibration": Path("nowhere.txt")}, f"there is no file nowhere.txt (in {Path.cwd()})"),
        ({"method": "gptq", "calibration": Path("/")}, "/ cannot be read: Is a directory"),
        ({"method": "int8", "dtype": "int8"}, "dtype must be auto, bfloat16, float16, float32"),
    ],
)
def test_what_cannot_be_is_refused(tiny_model: Path, tmp_path: Path, asked: dict[str, Any], said: str):
    with pytest.raises(ValidationError) as refused:
        jaxllm.quantize(tiny_model, tmp_path / "out", progress=False, **asked)
    assert said in str(refused.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "is empty. Give a text like what the model will see, or leave it out"),
        (
            "Zeile\nein Gru\u00df".encode("latin1"),
            "is not UTF-8: line 2 has the byte 0xDF. Convert it, such as by: iconv",
        ),
        (b"some words", "a sequence to calibrate and one to measure with take 64 each: give a text of at least 128."),
        (b"some words " * 10, "give a text of at least 128, or sequence_length="),
    ],
    ids=["empty", "latin1", "short", "few sequences"],
)
def test_a_text_that_cannot_be_used_says_what_can(tiny_model: Path, tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    tokenizer = load_tokenizer(tiny_model)
    with pytest.raises(ValidationError) as refused:
        read_samples(path, tokenizer, length=64, count=4, seed=0)
    assert said in str(refused.value) and str(path) in str(refused.value)
    if found := re.search(r"sequence_length=(\d+)", str(refused.value)):
        assert read_samples(path, tokenizer, length=int(found[1]), count=4, seed=0).calibration


def test_what_is_quantized_is_not_quantized_again(
    reports: dict[str, QuantizationReport], tiny_model: Path, tmp_path: Path
):
    with pytest.raises(ValidationError, match="quantized already, by 'awq': quantize the one in 16 bits"):
        jaxllm.quantize(reports["awq"].output, tmp_path / "out", method="int8", progress=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(WeightsError, match="exists already"):
        jaxllm.quantize(tiny_model, tmp_path / "there", method="int8")


def test_an_interrupted_run_leaves_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith("out.unfinished")
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "quantize_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jaxllm.quantize(tiny_model, tmp_path / "out", method="int8", perplexity=False, progress=False)
    assert not any(tmp_path.iterdir())


def test_the_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    out = str(tmp_path / "out")
    words = ["quantize", str(tiny_model), "--method", "int4", "--symmetric", "--no-perplexity", "--output", out]
    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert main([*words, "--num-samples", "3", "--json"]) == 0
    assert "num_samples=3 has no effect: method='int4' looks at no text" in caplog.text
    assert json.loads(capsys.readouterr().out)["bytes_after"] == sum(
        array.nbytes for array in jax.tree.leaves(stored_tensors(tmp_path / "out"))
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = [group["weights"] for group in config["config_groups"].values()]
    assert all(group["symmetric"] for group in groups)
    assert sorted(group["group_size"] for group in groups) == [64, 128]
    assert main(words) == 1
    assert "exists already, and is not an empty directory" in capsys.readouterr().err


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    with TensorFiles(folder) as reader:
        return {name: reader.raw(name).copy() for name in reader.names()}
