"""GGUF reading: files written by the ``gguf`` package come back under HF's names, broken ones are refused by name."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.gguf_files import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, hf_weights, write_gguf

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf import GGUFReader, read_metadata
from jaxllm.weights.formats.gguf_config import llama3_divisors
from jaxllm.weights.formats.gguf_header import parse_header
from jaxllm.weights.resolve import resolve

DATA = Path(__file__).parent.parent / "data"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


@pytest.mark.parametrize("architecture", list(CLASSES))
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_weights_come_back_as_hf_has_them(tmp_path: Path, architecture: str, kind: Kind) -> None:
    weights = hf_weights(architecture)
    path = write_gguf(tmp_path / "m.gguf", architecture, weights, kind)
    with GGUFReader(path) as reader:
        assert set(reader.names()) == set(weights)
        for name, expected in weights.items():
            seen = reader.read(name)
            assert reader.shape(name) == expected.shape == seen.shape
            assert reader.dtype(name) == (kind.name if expected.ndim == 2 else "F32")
            stored = kind in (Kind.F16, Kind.BF16) and expected.ndim == 2
            assert seen.dtype == (reader.read("lm_head.weight").dtype if stored else np.float32)
            if expected.ndim == 2 and kind != Kind.F32:
                # Blocks lie along rows, so that rounding before or after reordering the rows is the same.
                expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
            np.testing.assert_allclose(seen.astype(np.float32), expected, rtol=0, atol=2e-6)
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
            for rows in (slice(3, 17), slice(None, None, 2), slice(-5, None), slice(9, 9)):
                np.testing.assert_array_equal(reader.read(name, rows), reader.read(name)[rows])


@pytest.mark.parametrize("architecture", list(CLASSES))
def test_config(tmp_path: Path, architecture: str) -> None:
    tied = architecture == "gemma3"
    path = write_gguf(tmp_path / "m.gguf", architecture, hf_weights(architecture, tied), Kind.F16)
    with GGUFReader(path) as reader:
        config = reader.config()
    expected: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50_000.0,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    assert {key: config[key] for key in expected} == expected
    assert "rope_scaling" not in config
    if architecture == "gemma3":
        assert config["sliding_window"] == 16
        assert config["layer_types"] == ["sliding_attention"] * LAYERS
        assert config["query_pre_attn_scalar"] == HEAD_DIM
    json.dumps(config)


def test_config_of_variants(tmp_path: Path) -> None:
    def config(edit: Callable[[gguf.GGUFWriter], None], kind: Kind = Kind.Q4_0, **extra: np.ndarray) -> dict[str, Any]:
        weights = hf_weights("llama") | {name.replace("_weight", ".weight"): value for name, value in extra.items()}
        with GGUFReader(write_gguf(tmp_path / "m.gguf", "llama", weights, kind, edit)) as reader:
            assert "rope_freqs.weight" not in set(reader.names())
            return reader.config()

    assert config(lambda writer: None)["torch_dtype"] == "bfloat16"
    assert config(lambda writer: writer.add_eot_token_id(3))["eos_token_id"] == [2, 3]

    windowed = config(lambda writer: writer.add_sliding_window(64))
    assert (windowed["architectures"], windowed["sliding_window"]) == (["MistralForCausalLM"], 64)

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    assert config(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}

    divisors = llama3_divisors(50_000.0, HEAD_DIM, 32.0).astype(np.float32)
    scaling = config(lambda writer: None, rope_freqs_weight=divisors)["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)
    with pytest.raises(WeightsError, match=r"m\.gguf.*rope_freqs\.weight.*not Llama 3's"):
        config(lambda writer: None, rope_freqs_weight=divisors * np.array([1, 2, 1, 1], np.float32))

    def experts(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)

    mixtral = config(experts)
    assert (mixtral["architectures"], mixtral["num_local_experts"], mixtral["num_experts_per_tok"]) == (
        ["MixtralForCausalLM"],
        8,
        2,
    )
    path = write_gguf(tmp_path / "q.gguf", "qwen2", hf_weights("qwen2"), edit=experts)
    with (
        GGUFReader(path) as reader,
        pytest.raises(WeightsError, match="mixture of experts of the architecture .qwen2."),
    ):
        reader.config()


def test_llama3_divisors_are_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(500_000.0, 128, 8.0), scaled.numpy(), rtol=1e-5)


def test_smollm2_weights_are_those_that_transformers_loads(smollm2_gguf: Path) -> None:
    """The data file holds values and sums of 29 tensors as transformers' GGUF loader gave them; its key says which."""
    recorded = json.loads((DATA / "smollm2_weights_transformers.json").read_text())["tensors"]
    with GGUFReader(smollm2_gguf) as reader:
        assert len(list(reader.names())) == 272
        for name, oracle in recorded.items():
            seen = reader.read(name)
            assert list(seen.shape) == oracle["shape"]
            np.testing.assert_allclose(seen.reshape(-1)[oracle["flat_index"]], oracle["value"], rtol=1e-6, atol=1e-8)
            assert seen.sum(dtype=np.float64) == pytest.approx(oracle["sum"], rel=1e-6, abs=1e-3)
        config = reader.config()
    assert (config["num_hidden_layers"], config["rope_theta"], config["rms_norm_eps"]) == (30, 100_000.0, 1e-5)
    assert config["tie_word_embeddings"]


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", "llama", hf_weights("llama"), Kind.Q8_0)


@pytest.fixture(scope="module")
def good(good_file: Path) -> bytes:
    return good_file.read_bytes()


@pytest.fixture(scope="module")
def header_length(good_file: Path) -> int:
    return gguf.GGUFReader(good_file).data_offset


def read_everything(path: Path) -> None:
    with GGUFReader(path) as reader:
        for name in reader.names():
            reader.read(name)
        reader.config()


def test_every_truncation_is_refused(good: bytes, header_length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in range(header_length + 40):
        with pytest.raises(WeightsError, match=r"cut\.gguf"):
            parse_header(memoryview(good)[:length], path)
    for length in (0, 1, 20, header_length // 2, header_length, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(WeightsError, match=r"cut\.gguf"):
            GGUFReader(path)
    path.write_bytes(good)
    read_everything(path)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupt_header_is_refused_or_read(
    good: bytes, header_length: int, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_length - 1))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(b"\x00" * 8)))
        content[at : at + len(new)] = new
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(bytes(content))
    tracemalloc.start()
    try:
        with contextlib.suppress(WeightsError):
            read_everything(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(good)
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300), version=st.sampled_from([2, 3]))
@example(noise=b"\xff" * 300, version=3)
def test_noise_after_the_magic_is_refused(noise: bytes, version: int, tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + noise)
    with pytest.raises(WeightsError):
        GGUFReader(path)


def test_array_bombs_are_refused_at_once(tmp_path: Path) -> None:
    def error(value: bytes) -> str:
        start = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
        key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
        with pytest.raises(WeightsError) as caught:
            parse_header(memoryview(start + key + value), tmp_path)
        return str(caught.value)

    one_array = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    assert "the array 'k' is nested more than" in error(one_array * 10_000)
    strings = (8).to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    assert "the array 'k' claims 1152921504606846976 elements" in error(strings + bytes(80_000))
    numbers = (10).to_bytes(4, "little") + (2**61).to_bytes(8, "little")
    assert "the array 'k' needs 18446744073709551616 bytes" in error(numbers + bytes(64))


def patched(content: bytes, old: bytes, new: bytes, after: bytes = b"") -> bytes:
    at = content.index(old, content.index(after) if after else 0)
    return content[:at] + new + content[at + len(old) :]


def test_errors_name_file_and_tensor(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"

    def error(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            read_everything(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "not a GGUF file: it starts with b'PK" in error(b"PK\x03\x04" + good[4:])
    assert "version 1 is not supported" in error(good[:4] + b"\x01\x00\x00\x00" + good[8:])
    assert "big-endian" in error(good[:4] + b"\x00\x00\x00\x03" + good[8:])
    assert "not a GGUF file: it starts with" in error(b"GGML" + good[4:])
    assert "truncated" in error(b"")
    embed = b"token_embd.weight"
    dims = (2).to_bytes(4, "little") + HIDDEN.to_bytes(8, "little") + VOCAB.to_bytes(8, "little")
    kind = (8).to_bytes(4, "little")
    odd = error(patched(good, embed + dims + kind, embed + dims + (99).to_bytes(4, "little")))
    assert "'token_embd.weight' has type number 99" in odd and "Q6_K" in odd
    ragged = dims[:4] + (33).to_bytes(8, "little") + dims[12:]
    assert "'token_embd.weight' has shape (40, 33)" in error(patched(good, embed + dims, embed + ragged))
    huge = dims[:12] + (2**40).to_bytes(8, "little")
    assert "'token_embd.weight' (Q8_0, shape (1099511627776, 32)) is truncated: expected" in error(
        patched(good, embed + dims, embed + huge)
    )
    short = error(good[:-100])
    assert "is truncated: expected" in short and "bytes at byte" in short
    assert "known are llama, qwen2, qwen3, gemma" in error(
        patched(good, b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00llamb")
    )
    assert "'blk.0.ffn_uq.weight' is not one" in error(patched(good, b"blk.0.ffn_up.weight", b"blk.0.ffn_uq.weight"))
    assert "block_count is 3 but there are tensors for 2 layers" in error(
        patched(good, b"block_count\x04\x00\x00\x00\x02", b"block_count\x04\x00\x00\x00\x03")
    )


def test_a_model_may_be_split_into_files(tmp_path: Path) -> None:
    """By the writer of the gguf package, with no tensor in the first file, as models on the hub are."""
    weights = hf_weights("llama")
    whole = write_gguf(tmp_path / "whole.gguf", "llama", weights)
    (tmp_path / "split").mkdir()

    def split(writer: gguf.GGUFWriter) -> None:
        writer.split_max_tensors, writer.small_first_shard = 7, True
        writer.tensors.append({})

    write_gguf(tmp_path / "split" / "model.gguf", "llama", weights, edit=split)
    files = sorted((tmp_path / "split").glob("*.gguf"))
    assert len(files) > 3 and resolve(tmp_path / "split") == files[0]
    with GGUFReader(files[0]) as ours, GGUFReader(whole) as expected:
        assert set(ours.names()) == set(expected.names()) == set(weights)
        assert ours.config() == expected.config()
        for name in ours.names():
            np.testing.assert_array_equal(ours.read(name), expected.read(name))
    with pytest.raises(WeightsError, match=r"this is file 2 of the \d that .*: give the first, model-00001-of-"):
        GGUFReader(files[1])
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(WeightsError, match=r"found by their names: call them NAME-00001-of-"):
        GGUFReader(tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(files[0])
    files[2].unlink()
    with pytest.raises(WeightsError, match=f"{files[2].name}: cannot be opened: No such file"):
        GGUFReader(files[0])


def test_missing_file_directory_unknown_name_and_closed_reader(good: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.gguf: cannot be opened"):
        GGUFReader(tmp_path / "none.gguf")
    with pytest.raises(WeightsError, match="cannot be opened"):
        read_metadata(tmp_path)
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    reader = GGUFReader(path)
    with pytest.raises(WeightsError, match=r"good\.gguf: there is no tensor 'model\.layers\.9"):
        reader.read("model.layers.9.mlp.up_proj.weight")
    reader.close()
    assert reader.shape("model.norm.weight") == (HIDDEN,)
    with pytest.raises(WeightsError, match="tensor 'output_norm.weight' cannot be read: .*closed file"):
        reader.read("model.norm.weight")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_file_is_not_mapped_while_weights_are_read(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    with GGUFReader(path) as reader:
        weight = reader.read("model.embed_tokens.weight")
        assert str(path) not in Path("/proc/self/maps").read_text()
    assert weight.shape == (VOCAB, HIDDEN)


def test_threads_may_read_at_once(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    with GGUFReader(path) as reader, concurrent.futures.ThreadPoolExecutor(4) as pool:
        names = list(reader.names())
        alone = {name: reader.read(name) for name in names}
        for name, seen in zip(names * 40, pool.map(reader.read, names * 40), strict=True):
            np.testing.assert_array_equal(seen, alone[name])


def test_a_file_that_has_become_shorter_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    with GGUFReader(path) as reader:
        os.truncate(path, len(good) // 2)
        with pytest.raises(WeightsError, match=r"good\.gguf: tensor '.*' is cut off: the file has become shorter"):
            for name in reader.names():
                reader.read(name)


def test_metadata_of_every_value_type(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "anything")
    expected: dict[str, Any] = {"general.architecture": "anything"}
    numbers = {
        "uint8": 200,
        "int8": -5,
        "uint16": 60_000,
        "int16": -30_000,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "häß \U0001f600",
    }
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
        expected[f"x.{name}"] = value
    arrays: dict[str, list[Any]] = {
        "ints": [1, -2, 3],
        "floats": [0.5, 2.0],
        "flags": [True, False],
        "words": ["", "b"],
    }
    for name, values in arrays.items():
        writer.add_array(f"x.{name}", values)
        expected[f"x.{name}"] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_metadata(path) == expected
