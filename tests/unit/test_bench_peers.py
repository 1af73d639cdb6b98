"""How other engines are found, started, told what to do, and given the same model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.bench import peer_setup, plain_model
from jaxllm.bench.engine_process import EngineProcess
from jaxllm.bench.options import add_throughput_options
from jaxllm.bench.peer_setup import PeerSetup
from jaxllm.bench.throughput import run

PEERS = peer_setup.SCRIPTS
#: an engine that repeats the last token of each prompt, and prints where replies go
FAKE = f"""
import sys
sys.path.insert(0, {str(PEERS)!r})
from protocol import serve

class Session:
    def __init__(self, message):
        print("noise on standard output")
        self.facts = {{"model": message["model"]}}
        self.resets = 0
    def reset(self):
        self.resets += 1
    def generate(self, requests):
        if requests[0][1] == 99:
            sys.exit("a word at the end")
        return [[ids[-1]] * min(length, 5) for ids, length in requests]

serve(Session)
"""


@pytest.fixture
def engine(tmp_path: Path):
    script = tmp_path / "fake_peer.py"
    script.write_text(FAKE)
    process = EngineProcess("fake", [sys.executable, str(script)], dict(os.environ))
    yield process
    process.close()


def test_rounds(engine: EngineProcess, tmp_path: Path):
    file = tmp_path / "requests.json"
    file.write_text("[[[1, 2, 3], 4], [[7], 2]]")
    assert engine.ask({"op": "load", "model": "m"})["facts"] == {"model": "m"}
    reply = engine.ask({"op": "round", "requests": str(file), "output_len": None})
    assert reply["first_tokens"] == [3, 7] and reply["seconds"] > 0 and reply["peak_rss_bytes"] > 1_000_000
    assert engine.ask({"op": "round", "requests": str(file), "output_len": 1})["first_tokens"] == [3, 7]
    assert engine.cpu_seconds() >= 0
    # an engine that stops early has not done the work
    with pytest.raises(
        JaxLLMError, match=r"(?s)fake failed: RuntimeError: asked for 16 output tokens .* got 10.*noise"
    ):
        engine.ask({"op": "round", "requests": str(file), "output_len": 8})
    # it still answers
    assert engine.ask({"op": "round", "requests": str(file), "output_len": 2})["first_tokens"] == [3, 7]
    with pytest.raises(JaxLLMError, match=r"(?s)fake ended with exit status 1\..*a word at the end"):
        engine.ask({"op": "round", "requests": str(file), "output_len": 99})


def test_a_program_that_is_not_there():
    with pytest.raises(JaxLLMError, match="fake cannot be started"):
        EngineProcess("fake", ["/nowhere/python"], {})


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_throughput_options(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--compare", "vllm,sglang"], "transformers, .*each once; got 'vllm,sglang'"),
        (["--compare", "vllm,vllm"], "each once"),
        (["--compare", ","], "each once"),
        (["--compare", ""], "each once"),
        (["--compare", "vllm", "--peer-python", "vllm"], "takes NAME=PATH"),
        (["--compare", "vllm", "--peer-python", "vllm=/nowhere"], "/nowhere is no program"),
        (["--compare", "vllm", "--peer-python", "vllm=/bin/false"], "vllm is not installed for /bin/false"),
        (["--compare", "vllm"], "vllm is not installed for .*pip install vllm.*--peer-python vllm=ENV"),
        (["--compare", "transformers", "--dtype", "auto"], "give --dtype bfloat16, not auto"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str):
    monkeypatch.setattr(peer_setup, "_is_installed", lambda module, python: module != "vllm")
    with pytest.raises(ValidationError, match=message):
        PeerSetup(parsed(*argv))


@pytest.mark.parametrize("python", [sys.executable, os.path.realpath(sys.executable)])
def test_a_python_is_asked_whether_an_engine_is_installed(python: str):
    assert peer_setup._is_installed("json", python) and not peer_setup._is_installed("no_such_engine", python)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--include-startup"], "give --compare"),
        (["--threads", "2"], "are for --compare"),
    ],
)
def test_options_that_do_not_go_together(argv: list[str], message: str):
    with pytest.raises(ValidationError, match=message):
        run(parsed(*argv))


class Reader:
    """Weights as the readers give them."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self._weights = weights

    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._weights[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_written_safetensors_are_read_by_others(tmp_path: Path, dtype: str):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    draw = np.random.default_rng(0)
    weights = {
        "b": draw.standard_normal((3, 5)).astype(np.float32),
        "a": draw.standard_normal(7).astype(ml_dtypes.bfloat16),
    }
    reader: Any = Reader(weights)
    plain_model.write_safetensors(reader, tmp_path / "model.safetensors", dtype)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {"a", "b"}
    for name, array in weights.items():
        expected = torch.tensor(array.astype(np.float32)).to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)


def test_a_quantized_gguf_becomes_a_plain_one(tmp_path: Path):
    source, target = tmp_path / "q8.gguf", tmp_path / "plain.gguf"
    matrix = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    eight = gguf.GGMLQuantizationType.Q8_0
    quantized = gguf.quantize(matrix, eight)
    writer.add_tensor("matrix", quantized, raw_dtype=eight)
    writer.add_tensor("norm", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain_model.write_gguf(source, target, "bfloat16")
    reader = gguf.GGUFReader(target)
    assert reader.fields["llama.block_count"].contents() == 1
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["matrix"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["norm"].tensor_type == gguf.GGMLQuantizationType.F32
    values = np.array(tensors["matrix"].data).view(ml_dtypes.bfloat16).astype(np.float32)
    eight_bits = gguf.dequantize(quantized, eight)
    np.testing.assert_array_equal(values.reshape(4, 64), eight_bits.astype(ml_dtypes.bfloat16).astype(np.float32))
