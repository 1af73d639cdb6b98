"""What is saved, read by transformers and by the safetensors package: the weights that it was made from, bit by bit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxllm.models import whole_sequences
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.model import ModelConfig, base_prefix, body_specs
from jaxllm.models.pooler import PoolingModel
from jaxllm.models.registry import POOLING_ARCHITECTURES, model_config, pooling_model_config
from jaxllm.models.segments import resegment
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import saved_model
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
#: transformers' class -> fields of its config
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": DECODER,
    "Qwen2ForCausalLM": {**DECODER, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**DECODER, "head_dim": 24},
    "Gemma3ForCausalLM": {**DECODER, "head_dim": 20, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Gemma2ForCausalLM": {**DECODER, "head_dim": 20},
    "Phi3ForCausalLM": DECODER,
    "Olmo2ForCausalLM": DECODER,
    "GPTNeoXForCausalLM": {**DECODER, "hidden_size": 64},
    "StableLmForCausalLM": {**DECODER, "hidden_size": 64, "qk_layernorm": True, "use_parallel_residual": True},
    "CohereForCausalLM": {**DECODER, "use_qk_norm": True},
    "Glm4ForCausalLM": {**DECODER, "head_dim": 24},
    "OPTForCausalLM": DECODER,
    "GPT2LMHeadModel": {**DECODER, "n_inner": 80},
    "PhiForCausalLM": {**DECODER, "hidden_size": 64},
    "FalconForCausalLM": {**DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
    "ApertusForCausalLM": DECODER,
    "BertModel": {**DECODER, "type_vocab_size": 2},
    "LlamaModel": DECODER,
}
MODELS["Gemma3ForCausalLM"]["num_hidden_layers"] = 4
TOKENS = np.random.default_rng(0).integers(3, 300, size=(1, 40))
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def config_class(name: str) -> Any:
    family = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
    return getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")


def random_model(model: Any) -> Any:
    """Norms and biases are drawn too: transformers starts them at one and zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def loaded(directory: Path) -> tuple[ModelConfig, Any, Any, dict[str, Any]]:
    """(model, specs, params, config) of a checkpoint, in float32."""
    checkpoint = Checkpoint(directory)
    pools = checkpoint.config["architectures"][0] in POOLING_ARCHITECTURES
    model: Any = (pooling_model_config if pools else model_config)(checkpoint.config)
    specs = PoolingModel(body_specs(model), None) if pools else decoder_specs(model)
    params = checkpoint.load(specs, jnp.dtype(jnp.float32), DEVICE, prefix=base_prefix(model), seed=0, progress=False)
    return model, specs, params, checkpoint.config


def save(directory: Path, found: tuple[ModelConfig, Any, Any, dict[str, Any]], **changed: Any) -> None:
    model, specs, params, config = found
    arguments: dict[str, Any] = {
        "format": "safetensors",
        "quantization": None,
        "files": {},
        "tokenizer": None,
        **changed,
    }
    saved_model.save(directory, params, model=model, specs=specs, config=config, **arguments)


def stored(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def scores(model: Any) -> np.ndarray:
    with torch.no_grad():
        output = model(torch.tensor(TOKENS))
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_saved(
    name: str, separated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = random_model(getattr(transformers, name)(config_class(name)(**MODELS[name])))
    original.save_pretrained(tmp_path / "original")
    model, specs, params, config = loaded(tmp_path / "original")
    if separated:
        monkeypatch.setattr(hugging_face, "SHARD_BYTES", 30_000)
        params, specs = (resegment(tree, (1,) * model.num_layers) for tree in (params, specs))
    save(tmp_path / "saved", (model, specs, params, config))

    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == [name] and written["dtype"] == "float32"
    theirs, ours = stored(tmp_path / "original"), stored(tmp_path / "saved")
    # transformers' own pooler, which sentence embeddings have no use for, is not loaded
    theirs = {key: value for key, value in theirs.items() if not key.startswith("pooler.")}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape
        assert ours[key].tobytes() == tensor.tobytes(), key

    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 3) == separated
    assert {path.stat().st_mode for path in files} == {(tmp_path / "saved" / "config.json").stat().st_mode}
    again = getattr(transformers, name).from_pretrained(tmp_path / "saved").eval()
    assert np.abs(scores(again) - scores(original)).max() < 1e-5
    for before, after in zip(
        jax.tree.leaves(loaded(tmp_path / "original")[2]), jax.tree.leaves(loaded(tmp_path / "saved")[2]), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_an_old_gpt_neox_is_read(tmp_path: Path) -> None:
    """The hub's checkpoints have in each layer what follows from the config."""
    name = "GPTNeoXForCausalLM"
    random_model(getattr(transformers, name)(config_class(name)(**MODELS[name]))).save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    tensors = stored(tmp_path / "new")
    assert "embed_out.weight" in tensors
    for layer in range(MODELS[name]["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors[f"{attention}.bias"] = np.ones((1, 1, 8, 8), bool)
        tensors[f"{attention}.masked_bias"] = np.array([-1e9], np.float32)
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    for new, old in zip(*(jax.tree.leaves(loaded(tmp_path / folder)[2]) for folder in ("new", "old")), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_model_that_sees_images_is_saved_whole_and_its_text_as_a_text_model(tmp_path: Path) -> None:
    text = config_class("Gemma3ForCausalLM")(**MODELS["Gemma3ForCausalLM"])
    vision = {**IMAGES, "vision_use_head": False}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    original = random_model(transformers.Gemma3ForConditionalGeneration(config))
    original.save_pretrained(tmp_path / "original")
    save(tmp_path / "whole", loaded(tmp_path / "original"))
    again = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    for (name, theirs), (other, ours) in zip(original.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(theirs, ours), name
    model, _, params, written = loaded(tmp_path / "whole")
    model: Any = dataclasses.replace(model, vision=None)  # pyright: ignore[reportCallIssue]
    params = dataclasses.replace(params, vision=None)
    save(tmp_path / "text", (model, decoder_specs(model), params, written))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert np.abs(scores(again) - scores(original)).max() < 1e-5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Any, Any, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("llama")
    random_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))).save_pretrained(directory)
    return loaded(directory)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_directory_is_there_wholly_or_not_at_all(format: str, llama: Any, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            assert Path(folder, "config.json").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "deep" / "saved", llama, format=format, tokenizer=Tokenizer())
    assert not any((tmp_path / "deep").iterdir())


def test_what_is_there_already_is_left_alone(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", llama)
    before = stored(tmp_path / "empty")
    for directory in (tmp_path / "empty", tmp_path):
        with pytest.raises(WeightsError, match="exists already, and is not an empty directory"):
            save(directory, llama)
    with pytest.raises(ValueError, match="format must be 'safetensors' or 'orbax', got 'gguf'"):
        save(tmp_path / "other", llama, format="gguf")
    assert stored(tmp_path / "empty").keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


STREAMED = """
import resource, sys
from pathlib import Path
import jax
import jax.numpy as jnp
import safetensors.numpy
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader, saved_model
hf = {"architectures": ["LlamaForCausalLM"], "vocab_size": 30000, "hidden_size": 512, "intermediate_size": 2048,
      "num_hidden_layers": 10, "num_attention_heads": 8, "max_position_embeddings": 64}
model = model_config(hf)
specs = decoder_specs(model)
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
params = loader.dummy(specs, jnp.dtype(jnp.float32), device)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = peak()
saved_model.save(Path(sys.argv[1]), params, format="safetensors", model=model, specs=specs, quantization=None,
                 config=hf, files={}, tokenizer=None)
print((peak() - before) / 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20)
"""


def test_saving_copies_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path / "saved")], capture_output=True, text=True, check=True
    )
    grown, weights = map(float, done.stdout.split())
    assert weights > 250 and grown < 50


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Gemma3ForCausalLM"])
def test_gradients_equal_torchs(name: str, tmp_path: Path) -> None:
    """Of the mean log-probability of each next token, with respect to every weight; tied ones count twice."""
    original = random_model(getattr(transformers, name)(config_class(name)(**MODELS[name])))
    original.save_pretrained(tmp_path)
    ids = torch.tensor(TOKENS)
    original.zero_grad()
    (-original(ids, labels=ids).loss).backward()
    expected = {key: parameter.grad.numpy() for key, parameter in original.named_parameters()}
    model, specs, params, _ = loaded(tmp_path)
    assert isinstance(model, DecoderConfig)
    tokens = jnp.asarray(TOKENS)
    gradient_of = jax.jit(jax.grad(lambda params: whole_sequences.token_logprobs(model, params, tokens).mean()))
    ours = gradient_of(params)
    found = {tensor.name: tensor.value() for tensor in hugging_face.tensors(specs, ours)}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert np.abs(found[key] - gradient).max() < 1e-4 * max(np.abs(gradient).max(), 0.1), key
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    rough = gradient_of(rounded)
    for array, exact in zip(jax.tree.leaves(rough), jax.tree.leaves(ours), strict=True):
        error = np.linalg.norm(np.asarray(array, np.float32) - exact) / np.linalg.norm(exact)
        assert array.dtype == jnp.bfloat16 and error < 0.1
