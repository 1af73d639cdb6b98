"""`LLM.save`, and `LLM` of what it saved."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import JaxLLMError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["one", "two and two", "a longer line that fills more than one block of the cache"]
SMALL = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "num_gpu_blocks_override": 64}


def answers(llm: LLM) -> list[tuple[str, list[int]]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [(output.outputs[0].text, list(output.outputs[0].token_ids)) for output in outputs]


@pytest.mark.parametrize(
    ("format", "dtype"), [("safetensors", "float32"), ("safetensors", "bfloat16"), ("orbax", "bfloat16")]
)
def test_a_saved_model_answers_as_before(tiny_model: Path, tmp_path: Path, format: str, dtype: str):
    if format == "orbax":
        pytest.importorskip("orbax.checkpoint")
    generation = {"temperature": 0.25, "eos_token_id": 256}
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    with LLM(tmp_path / "model", dtype=dtype, **SMALL) as llm:
        before = answers(llm)
        weights = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(llm.engine.runner.params)]
        llm.save(tmp_path / "saved", format=format)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == generation
    with LLM(tmp_path / "saved", dtype=dtype, **SMALL) as llm:
        assert llm.engine.model_files.checkpoint.load_format == format
        assert llm.get_default_sampling_params().temperature == 0.25
        for saved, loaded in zip(weights, jax.tree.leaves(llm.engine.runner.params), strict=True):
            assert saved.tobytes() == np.asarray(loaded).tobytes()
        assert answers(llm) == before
    if format == "orbax":
        with pytest.raises(ValueError, match=r"quantization='int8', but .*saved holds orbax arrays, .*LLM\(model, q"):
            LLM(tmp_path / "saved", quantization="int8", **SMALL)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_quantized_weights_are_saved_as_they_are(tiny_model: Path, tmp_path: Path, format: str):
    if format == "orbax":
        pytest.importorskip("orbax.checkpoint")
    with LLM(tiny_model, quantization="int4", dtype="float32", **SMALL) as llm:
        before = answers(llm)
        weights = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(llm.engine.runner.params)]
        llm.save(tmp_path / "saved", format=format)
    if format == "orbax":
        with pytest.raises(ValueError, match="quantization='awq', but the checkpoint is quantized by 'int4'"):
            LLM(tmp_path / "saved", quantization="awq", **SMALL)
    with LLM(tmp_path / "saved", dtype="float32", **SMALL) as llm:
        for saved, loaded in zip(weights, jax.tree.leaves(llm.engine.runner.params), strict=True):
            assert saved.tobytes() == np.asarray(loaded).tobytes()
        assert answers(llm) == before


def test_saving_needs_nothing_that_is_not_installed(engine: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "orbax"] + ["orbax"]:
        monkeypatch.setitem(sys.modules, name, None)
    engine.save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    hint = r"orbax-checkpoint is not installed: pip install .orbax-checkpoint.*'\.\[orbax\]"
    with pytest.raises(JaxLLMError, match=hint):
        engine.save(tmp_path / "other", format="orbax")
    assert not (tmp_path / "other").exists()


def test_an_engine_that_was_shut_down_saves_nothing(engine: LLM, tiny_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="format must be 'safetensors' or 'orbax', got 'pt'"):
        engine.save(tmp_path / "saved", format="pt")
    engine.sleep(level=1)
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        engine.save(tmp_path / "saved")
    engine.wake_up()
    engine.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.save(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_dummy_weights_need_no_weight_file(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, **SMALL) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 5


@pytest.mark.parametrize("load_format", ["auto", "pt"])
def test_a_model_of_pickled_weights_answers_as_one_of_safetensors(tiny_model: Path, tmp_path: Path, load_format: str):
    torch = pytest.importorskip("torch")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with LLM(model, dtype="float32", **SMALL) as llm:
        wanted = answers(llm)
    tensors = load_file(model / "model.safetensors")
    if load_format == "auto":
        (model / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, model / "pytorch_model.bin")
    with LLM(model, dtype="float32", load_format=load_format, **SMALL) as llm:
        assert answers(llm) == wanted


def test_weights_in_another_form_than_asked_for_are_refused(tiny_model: Path):
    with pytest.raises(JaxLLMError, match="load_format='pt', but .* holds safetensors weights"):
        LLM(tiny_model, load_format="pt")
