"""Forms that ``jaxllm bench perplexity --every-form`` writes: each number is the nearest that its form has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.gguf_files import hf_weights
from support.gguf_files import write_gguf as write_source

from jaxllm.api.errors import ValidationError
from jaxllm.bench import quantized_forms
from jaxllm.bench.quantized_forms import type_of_rows, written_forms
from jaxllm.weights.quantization.bitsandbytes import NF4


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantized_forms, "load_tokenizer", lambda _: None)
    return write_source(tmp_path / "source.gguf", "llama", hf_weights("llama"))


def test_numbers_are_the_nearest(source: Path, tmp_path: Path):
    weights = hf_weights("llama")
    forms = written_forms(source, tmp_path / "forms", "text")
    nf4, w8a8 = (load_file(forms[name].written() / "model.safetensors") for name in ("nf4", "w8a8"))
    name = "model.layers.1.mlp.down_proj.weight"
    exact = weights[name]
    table = np.asarray(NF4)
    largest = np.abs(exact.reshape(-1, 64)).max(axis=1)
    every = (largest[:, None, None] * table).astype(np.float64)
    nearest = np.abs(every - exact.reshape(-1, 64, 1)).min(axis=-1)
    packed = nf4[name].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, 64)
    found = table[codes] * nf4[f"{name}.absmax"][:, None]
    np.testing.assert_allclose(np.abs(found - exact.reshape(-1, 64)), nearest, atol=1e-6)
    scales = w8a8[f"{name}_scale"].astype(np.float32)
    off = np.abs(w8a8[name] * scales - exact)
    # a scale in bfloat16 may be a 256th too small for the largest
    assert (off <= scales * 0.5 + np.abs(exact) / 256 * (np.abs(w8a8[name]) == 127) + 1e-7).all()
    config = json.loads((forms["w8a8"].path / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized" and config["hidden_size"] == exact.shape[0]
    assert forms["nf4"].written() == tmp_path / "forms" / "nf4"  # which is there, and stays as it is


def test_forms_are_made_of_gguf_files(tmp_path: Path):
    with pytest.raises(ValidationError, match="makes forms of a .gguf file"):
        written_forms(tmp_path, tmp_path / "forms", "text")


def test_types_are_ggmls(source: Path, tmp_path: Path):
    """By the package gguf where that rounds, too; rows of 32 and 64 numbers have no blocks of 256."""
    pytest.importorskip("xllamacpp")
    import gguf

    forms = written_forms(source, tmp_path / "forms", "text")
    exact = hf_weights("llama")["model.layers.1.mlp.down_proj.weight"]
    for name, kind in (("Q8_0", "Q8_0"), ("Q4_K", "Q5_0")):
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(forms[name].written()).tensors}
        found = tensors["blk.1.ffn_down.weight"]
        assert found.tensor_type.name == kind and tensors["token_embd.weight"].tensor_type.name == "Q8_0"
        values = gguf.dequantize(found.data, found.tensor_type)
        assert np.abs(values - exact).max() < (0.02 if kind == "Q8_0" else 0.2)


def test_rows_that_no_block_divides_stay_as_they_are():
    wanted = {("Q8_0", 64): "Q8_0", ("Q8_0", 48): "F16", ("Q4_K", 96): "Q5_0", ("Q4_K", 48): "F16"}
    assert {case: type_of_rows(*case) for case in wanted} == wanted
