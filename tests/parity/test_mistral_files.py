"""Models in Mistral's own form, against the same weights in Hugging Face's, which transformers reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.adapters import ADAPTERS, Oracle, difference, save_adapter
from support.tiny_model import SMALL, byte_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.models.registry import model_config
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.resolve import resolve

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 257,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
#: Hugging Face's names -> Mistral's
NAMES = {
    r"model\.embed_tokens": "tok_embeddings",
    r"model\.norm": "norm",
    "lm_head": "output",
    r"model\.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    r"self_attn\.(\w)_proj": r"attention.w\1",
    r"mlp\.gate_proj": "feed_forward.w1",
    r"mlp\.down_proj": "feed_forward.w2",
    r"mlp\.up_proj": "feed_forward.w3",
    r"block_sparse_moe\.": "",
    r"\.weight_scale": ".qscale_weight",
    r"\.input_scale": ".qscale_act",
}


def own_form(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as Mistral has them: number j of a head's first half is next to number j of its second one."""
    made = {}
    for name, tensor in tensors.items():
        if re.search(r"[qk]_proj\.weight$", name):
            halves = tensor.reshape(-1, 2, SIZES["head_dim"] // 2, tensor.shape[1])
            tensor = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape)
        for theirs, own in NAMES.items():
            name = re.sub(theirs, own, name)
        made[name] = tensor.contiguous()
    return made


def write(folder: Path, tensors: dict[str, torch.Tensor], **params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    save_file(own_form(tensors), folder / "consolidated.safetensors")
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hugging-face")
    config = transformers.MistralConfig(**SIZES, initializer_range=0.3, pad_token_id=None)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("mistral"), load_file(theirs / "model.safetensors"), dtype="float32")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    return folder


def test_an_engine_writes_what_transformers_does(own: Path, theirs: Path):
    model: Any = transformers.MistralForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    prompts = [[1, 2, 3], list(range(40, 90))]
    expected = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :] for p in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(own, config_format="mistral", load_format="mistral", **SMALL) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.save(own / "saved")
    assert [output.outputs[0].token_ids for output in outputs] == [tokens.tolist() for tokens in expected]
    saved = transformers.MistralForCausalLM.from_pretrained(own / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor(prompts[1:])
        torch.testing.assert_close(saved(ids).logits, model(ids).logits)


def assert_same_tensors(own: Path, theirs: Path) -> None:
    with Checkpoint(own).tensors() as ours, Checkpoint(theirs).tensors() as other:
        assert sorted(ours.names()) == sorted(other.names())
        for name in ours.names():
            whole = other.raw(name)
            assert (ours.shape(name), ours.dtype(name)) == (other.shape(name), other.dtype(name))
            np.testing.assert_array_equal(ours.raw(name), whole, err_msg=name)
            for rows in (slice(0, 0), slice(1, 2), slice(5, 21), slice(30, None)):
                if whole.ndim == 2:
                    np.testing.assert_array_equal(ours.raw(name, rows), whole[rows], err_msg=f"{name} {rows}")


def test_tensors_and_config_are_those_of_hugging_face(own: Path, theirs: Path):
    assert resolve(own) == own
    assert_same_tensors(own, theirs)
    # what stands in both is what the model is made of
    assert model_config(Checkpoint(own).config) == model_config(Checkpoint(theirs).config)


def test_experts(tmp_path: Path):
    torch.manual_seed(1)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, pad_token_id=None)
    model = transformers.MixtralForCausalLM(config)
    (theirs := tmp_path / "theirs").mkdir()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            halves = tensor.chunk(2, dim=1) if "gate_up" in name else (tensor,)
            prefix = name.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")[0]
            for which, half in zip(("w1", "w3") if "gate_up" in name else ("w2",), halves, strict=True):
                tensors |= {f"{prefix}.{i}.{which}.weight": half[i].contiguous() for i in range(len(half))}
        else:
            tensors[name.replace("mlp.gate", "block_sparse_moe.gate")] = tensor
    save_file(tensors, theirs / "model.safetensors")
    model.config.save_pretrained(theirs)
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    own = write(tmp_path / "own", tensors, moe=moe, rope_theta=1e6)
    assert_same_tensors(own, theirs)
    hf = json.loads((theirs / "config.json").read_text())
    hf = {**hf, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "architectures": ["MixtralForCausalLM"]}
    assert model_config(Checkpoint(own).config) == model_config(hf)
    # Mixtral's first files: no base of the rotation, and experts within the feed-forward layer
    first = {re.sub(r"(experts|gate)\.", r"feed_forward.\1.", n, count=1): t for n, t in own_form(tensors).items()}
    save_file(first, own / "consolidated.safetensors")
    (own / "params.json").write_text(json.dumps({**PARAMS, "moe": moe, "rope_theta": None}))
    assert_same_tensors(own, theirs)
    assert model_config(Checkpoint(own).config) == model_config(hf)


@pytest.mark.thorough
def test_beside_adapters_and_drafts(own: Path, theirs: Path, tmp_path: Path):
    """A model that drafts is in this form, too; adapters have Hugging Face's names, and PEFT says what they make."""
    adapters = {name: save_adapter(theirs, tmp_path / name, **config) for name, config in ADAPTERS.items()}
    oracle = Oracle(theirs, adapters)
    names: list[str | None] = [None, *adapters, None]
    given = [None if name is None else LoRARequest(name, 1 + names.index(name), adapters[name]) for name in names]
    prompts = [[(7 * i + j * j) % 250 for j in range(5 + 4 * i)] for i in range(len(names))]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True)
    arguments = {**SMALL, "config_format": "mistral", "load_format": "mistral", "enforce_eager": False}
    arguments |= {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 64}
    drafts = {"method": "draft_model", "model": str(own), "num_speculative_tokens": 2}
    with LLM(own, **arguments, speculative_config=drafts, enable_lora=True, max_loras=2) as llm:
        outputs = llm.generate(prompts, params, lora_request=given, use_tqdm=False)
    for name, output in zip(names, outputs, strict=True):
        assert difference(oracle, name, output) < 1e-3
        assert name is None or difference(oracle, None, output) > 0.01


def test_eight_bit_floats_keep_their_scales(theirs: Path, tmp_path: Path):
    (other := tmp_path / "theirs").mkdir()
    tensors = {}
    for name, tensor in load_file(theirs / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        scale = tensor.abs().max() / 448
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale")] = scale.clone()
        tensors[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    save_file(tensors, other / "model.safetensors")
    hf = json.loads((theirs / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(hf))
    own = write(tmp_path / "own", tensors, quantization={"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"})
    assert_same_tensors(own, other)
    config = Checkpoint(own).config
    assert config["quantization_config"] == {"quant_method": "fp8", "activation_scheme": "static"}
    assert config["dtype"] == "bfloat16"


def test_rows_alone_are_put_in_order(tmp_path: Path):
    """The groups of columns (act-order) stay, though there are as many of them as rows; words of rows are refused."""
    module, rows = "layers.0.attention.wq", SIZES["num_attention_heads"] * SIZES["head_dim"]
    groups = torch.arange(rows, dtype=torch.int32) % 2
    tensors = {f"{module}.weight_g_idx": groups, f"{module}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}
    tensors |= {f"{module}.weight_scale": torch.arange(rows * 2.0).reshape(rows, 2)}
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    save_file(tensors, tmp_path / "consolidated.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    with Checkpoint(tmp_path).tensors() as found:
        np.testing.assert_array_equal(found.raw(f"{q}.weight_g_idx"), groups)
        assert found.raw(f"{q}.weight_scale")[:3, 0].tolist() == [0, 4, 8]
        with pytest.raises(WeightsError, match="wq.weight_zero_point' has several rows in a word"):
            found.raw(f"{q}.weight_zero_point")


def test_both_forms_beside_each_other(own: Path, theirs: Path, tmp_path: Path):
    """Repositories of Mistral's have the tensors twice; neither is taken for the other, and arguments choose."""
    for file in [*own.glob("*.json"), *own.glob("*.safetensors"), *theirs.glob("*.safetensors")]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((theirs / "config.json").read_text()), "max_position_embeddings": 333, "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint(tmp_path).load_format == "safetensors"
    assert Checkpoint(tmp_path).config["max_position_embeddings"] == 333
    asked = Checkpoint(tmp_path, config_format="mistral")
    assert (asked.load_format, asked.config["max_position_embeddings"]) == ("mistral", 512)
    # of tokens config.json knows more
    assert asked.config["eos_token_id"] == 7
    assert Checkpoint(tmp_path, "safetensors", config_format="mistral").load_format == "safetensors"
    assert Checkpoint(tmp_path, "mistral").load_format == "mistral"
    assert_same_tensors(tmp_path, theirs)


def described(folder: Path, **params: Any) -> Any:
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    return model_config(Checkpoint(folder, "dummy").config)


def test_windows_and_longer_contexts(tmp_path: Path):
    assert described(tmp_path, sliding_window=64).layer_window == (64, 64)
    # Mistral 7B's first file has no base of the rotation, and means this one
    assert described(tmp_path, sliding_window=64, rope_theta=None) == described(tmp_path, sliding_window=64)
    assert described(tmp_path, sliding_window=[None, 32], n_layers=4).layer_window == (None, 32, None, 32)
    yarn = {"factor": 4, "original_max_position_embeddings": 512, "beta": 32, "alpha": 1}
    same = {**SIZES, "architectures": ["MistralForCausalLM"]}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for apply_scale, factor in ((False, {"attention_factor": 1.0}), (True, {})):
        found = described(tmp_path, yarn={**yarn, "apply_scale": apply_scale})
        assert found == model_config({**same, "rope_scaling": {**scaling, **factor}})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"llama_4_scaling": {"beta": 0.1}}, "describes queries that grow with their position"),
        ({"qk_nope_head_dim": 64}, "describes latents"),
        ({"moe": {"num_experts": 4, "num_shared_experts": 1}}, "describes experts that every token goes to"),
        ({"sliding_window": [1, 2]}, r"windows of several sizes \(\[1, 2\]\)"),
        ({"quantization": {"qformat_weight": "nvfp4"}}, "quantization={'qformat_weight': 'nvfp4'}, which is not supp"),
        ({"n_heads": None}, "params.json: there is no 'n_heads'"),
        ({"moe": {"num_experts": 4}}, "params.json: its moe has no 'num_experts_per_tok'"),
    ],
)
def test_what_no_family_computes_is_refused(tmp_path: Path, params: dict[str, Any], words: str):
    with pytest.raises((ValidationError, WeightsError), match=words):
        described(tmp_path, **params)


def test_what_is_not_there_is_said(theirs: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="there is no params.json, which config_format='mistral' reads"):
        Checkpoint(theirs, config_format="mistral")
    with pytest.raises(ValidationError, match="load_format='mistral', but .* holds safetensors weights"):
        Checkpoint(theirs, "mistral")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(WeightsError, match="no config.json"):
        Checkpoint(tmp_path, config_format="hf")


def test_names_of_modules_are_hugging_faces(tmp_path: Path):
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    groups = {"some": {"targets": ["layers.1.attention.wq", "re:.*w2"], "weights": weights}}
    stored = {"quant_method": "compressed_tensors", "config_groups": groups, "ignore": ["output", "Linear"]}
    described(tmp_path, quantization=stored)
    found = Checkpoint(tmp_path, "dummy").config["quantization_config"]
    wanted = {"some": {"targets": ["model.layers.1.self_attn.q_proj", "re:.*w2"], "weights": weights}}
    assert (found["config_groups"], found["ignore"]) == (wanted, ["lm_head", "Linear"])


@pytest.mark.parametrize("prefix", ["mm_whisper_embeddings", "mm_streams_embeddings.embedding_module"])
def test_what_hears_is_left_out(own: Path, tmp_path: Path, prefix: str):
    """Voxtral's embeddings of tokens lie beside what hears."""
    tensors = load_file(own / "consolidated.safetensors")
    tensors[f"{prefix}.tok_embeddings.weight"] = tensors.pop("tok_embeddings.weight")
    tensors[f"{prefix}.whisper_encoder.transformer.layers.0.attention.wq.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "multimodal": {"whisper_model_args": {}}}))
    assert_same_tensors(tmp_path, own)


def test_what_sees_is_left_out(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = load_file(own / "consolidated.safetensors")
    save_file({**tensors, "vision_encoder.conv.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "vision_encoder": {"hidden_size": 8}}))
    assert_same_tensors(tmp_path, own)
    assert "it takes text alone" in caplog.text
