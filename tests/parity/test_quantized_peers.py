"""What `jaxllm.quantize` writes, as the packages that made the formats read it: bit for bit what we make of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quantized_checkpoints
from support.tiny_model import SMALL, write_tiny_model

import jaxllm
from jaxllm.models.matrices import matrices
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.quantizing.layer import weight_of
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.formats.tensor_files import TensorFiles
from pallas_kernels.quantized import dense

pytestmark = pytest.mark.peer
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def written(model: Path, folder: Path, **asked: Any) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """What `read` finds in what `jaxllm.quantize` writes."""
    text = folder / "text.txt"
    text.write_text(" ".join(str(i * i) for i in range(400)))
    few = {"num_samples": 2, "sequence_length": 64, "perplexity": False, "progress": False}
    jaxllm.quantize(model, folder / "out", calibration=text, **few, **asked)
    return read(folder / "out")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """quantization_config, the tensors of a matrix, as torch has them, and the matrix as we read it."""
    torch = pytest.importorskip("torch")
    checkpoint = Checkpoint(folder)
    specs = decoder_specs(model_config(checkpoint.config))
    checkpoint.quantize(None, matrices(specs), prefix="model.")
    assert checkpoint.quantization is not None
    method, name = checkpoint.quantization.method, f"{MODULE}.weight"
    found = checkpoint.quantization.matrices[name]
    with checkpoint.tensors() as reader, TensorFiles(folder) as files:
        arrays = {
            kind: method.array(reader, name, found, kind, slice(None), None)
            for kind in found.layout.shapes(*found.shape)
        }
        raw = {
            end: files.raw(tensor) for tensor in files.names() if (end := tensor.removeprefix(f"{MODULE}.")) != tensor
        }
        # what numpy has no types of
        kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
        tensors = {
            end: torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()).view(kinds[array.dtype.name])
            if array.dtype.name in kinds
            else torch.from_numpy(array.copy())
            for end, array in raw.items()
        }
    ours = np.asarray(dense(weight_of(found.layout, jax.tree.map(jnp.asarray, arrays)), jnp.dtype(jnp.float32)))
    return json.loads((folder / "config.json").read_text())["quantization_config"], tensors, ours


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "int8"},
        {"method": "int4"},
        {"method": "int4", "symmetric": True, "group_size": 32},
        {"method": "fp8"},
    ],
)
def test_compressed_tensors(tiny_model: Path, tmp_path: Path, asked: dict[str, Any]):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config, tensors, ours = written(tiny_model, tmp_path, **asked)
    read = quantization.QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    # one, or one a size of groups
    scheme = next(each for each in read.config_groups.values() if {MODULE, "Linear"} & set(each.targets))
    tensors = {end: t.float() if end == "weight_scale" else t for end, t in tensors.items()}
    reader = compressors.BaseCompressor.get_value_from_registry(config["format"])
    theirs = reader.decompress(tensors, scheme)["weight"]
    np.testing.assert_array_equal(theirs.float().numpy(), ours)


@pytest.mark.parametrize("name", ["nvfp4", "dense mxfp4", "mxfp8", "packed 4 bits with zeros"])
def test_compressed_tensors_reads_the_same(tmp_path: Path, name: str):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config, tensors, ours = read(quantized_checkpoints.write(tmp_path, name)[0])
    stored = quantization.QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    theirs = compressors.BaseCompressor.get_value_from_registry(config["format"]).decompress(
        tensors, stored.config_groups["group_0"]
    )["weight"]
    # which is bfloat16: a number that an exponent scales is exact in it
    rtol = 0 if name.endswith(("mxfp4", "mxfp8")) else 2.0**-8
    np.testing.assert_allclose(theirs.float().numpy(), ours, rtol=rtol, atol=0)


@pytest.mark.parametrize("asked", [{"method": "int8"}, {"method": "int4", "symmetric": True}, {"method": "fp8"}])
def test_transformers(tiny_model: Path, tmp_path: Path, asked: dict[str, Any]):
    """It needs compressed-tensors to load them. Packed zero points of int4 it refuses by their shape."""
    pytest.importorskip("compressed_tensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    jaxllm.quantize(tiny_model, tmp_path / "out", perplexity=False, progress=False, **asked)
    ids = list(range(1, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1).numpy()
    params = jaxllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with jaxllm.LLM(tmp_path / "out", **SMALL) as llm:
        [output] = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    entries = (output.prompt_logprobs or [])[1:]
    ours = [entry[token].logprob for token, entry in zip(ids[1:], entries, strict=True) if entry]
    np.testing.assert_allclose(ours, theirs[range(len(ids) - 1), ids[1:]], atol=1e-4)


def test_transformers_with_inputs_rounded_to_int8(tmp_path: Path):
    """It takes 127.5 for a token's largest number where this takes 127, so each rounds to other numbers: both are 0.1
    off the model whose inputs are not rounded. What reads other matrices is off by 4 and more.
    """
    pytest.importorskip("compressed_tensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stored, _ = quantized_checkpoints.write(tmp_path, "int8")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"]["quantization_status"] = "compressed"  # else it makes weights of its own
    (stored / "config.json").write_text(json.dumps(config))
    ids = list(range(1, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1).numpy()
    params = jaxllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with jaxllm.LLM(stored, skip_tokenizer_init=True, **SMALL) as llm:
        [output] = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    entries = (output.prompt_logprobs or [])[1:]
    ours = np.array([entry[token].logprob for token, entry in zip(ids[1:], entries, strict=True) if entry])
    assert np.abs(ours - theirs[range(len(ids) - 1), ids[1:]]).mean() < 0.2


def of_file(package: str, *parts: str) -> Any:
    """A module by its file: a package whose own beginning needs other versions of what is installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    path = Path(found.origin).parent.joinpath(*parts)
    spec = importlib.util.spec_from_file_location(parts[-1].removesuffix(".py"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_autoawq(tiny_model: Path, tmp_path: Path):
    dequantize: Callable[..., Any] = of_file("awq", "utils", "packing_utils.py").dequantize_gemm
    config, tensors, ours = written(tiny_model, tmp_path, method="awq")
    theirs = dequantize(
        tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), config["bits"], config["group_size"]
    )
    np.testing.assert_array_equal(theirs.T.numpy(), ours)


@pytest.mark.parametrize(
    "asked", [{}, {"bits": 8, "symmetric": False}, {"bits": 3, "symmetric": False}, {"bits": 2}, {"desc_act": True}]
)
def test_gptqmodel(tiny_model: Path, tmp_path: Path, asked: dict[str, Any]):
    layers = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    models = pytest.importorskip("gptqmodel.utils.model")
    config, tensors, ours = written(tiny_model, tmp_path, method="gptq", **asked)
    rows, columns = ours.shape
    layer = layers.TorchLinear(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=config["sym"],
        desc_act=config["desc_act"],
        in_features=columns,
        out_features=rows,
        bias=False,
    )
    layer.load_state_dict(tensors, strict=False)
    layer.scales = layer.scales.float()
    models.convert_gptq_v1_to_v2_format_module(module=layer, bits=config["bits"], pack_dtype=layer.pack_dtype)
    layer.post_init()
    theirs = layer.dequantize_weight()
    np.testing.assert_allclose(theirs.T.float().numpy(), ours, rtol=1e-3, atol=1e-6)
