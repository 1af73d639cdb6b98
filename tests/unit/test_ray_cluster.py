"""What jaxllm.ray does without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm import SamplingParams
from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.ray import EnginePool, EngineProcessorConfig, build_processor, cluster
from jaxllm.ray.processor import params_of, prompt_of


def test_importing_it_imports_neither_ray_nor_jax():
    code = "import jaxllm.ray, sys; print(*[name for name in ('ray', 'jax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_where_ray_is_missing_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for use in (
        lambda: EnginePool("smollm2-135m-instruct"),
        lambda: build_processor(EngineProcessorConfig(model_source="smollm2-135m-instruct")),
    ):
        with pytest.raises(JaxLLMError, match=r"ray is not installed: .*pip install '\.\[ray\]'"):
            use()


@pytest.mark.parametrize(
    ("machines", "engines", "given", "wanted"),
    [
        ([{"CPU": 8}], 2, {}, (4, 0)),
        ([{"CPU": 8}], 3, {}, (2, 0)),
        ([{"CPU": 8}, {"CPU": 2}], 2, {}, (4, 0)),
        ([{"CPU": 8}, {"CPU": 6}], 2, {}, (6, 0)),
        ([{"CPU": 8}], 2, {"spare_cpus": 1}, (3, 0)),
        ([{"CPU": 1}], 1, {"spare_cpus": 1}, (1, 0)),
        ([{"CPU": 8, "GPU": 4}], 2, {}, (1, 2)),
        ([{"CPU": 8, "GPU": 4}], 4, {"num_gpus": 1, "num_cpus": 0}, (0, 1)),
        ([{"CPU": 8, "GPU": 4}], 2, {"num_gpus": 0}, (4, 0)),
    ],
)
def test_each_engine_gets_its_share(machines, engines: int, given, wanted):
    args = engine_args("model", tensor_parallel_size=2)
    found = cluster.resources(machines, args, engines, **{"num_cpus": None, "num_gpus": None, **given})
    assert (found["num_cpus"], found["num_gpus"]) == wanted


def test_what_does_not_fit_is_refused():
    machines: list[dict[str, float]] = [{"CPU": 4}, {"CPU": 3}]
    text = r"num_engines=4 with num_cpus=2 and num_gpus=0 .* 4 CPUs and 0 GPUs, 3 CPUs and 0 GPUs: 3 would fit"
    with pytest.raises(ValidationError, match=text):
        cluster.resources(machines, engine_args("model"), 4, 2, None)
    with pytest.raises(ValidationError, match="num_cpus must be at least 0, got -1"):
        cluster.resources(machines, engine_args("model"), 1, -1, None)


def test_an_engine_without_gpus_is_on_the_cpu_and_takes_its_threads():
    assert cluster.environment({"num_cpus": 3, "num_gpus": 0}) == {"NPROC": "3", "JAX_PLATFORMS": "cpu"}
    assert cluster.environment({"num_cpus": 0.5, "num_gpus": 1}) == {"NPROC": "1"}


def test_paths_hold_in_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cluster.worker_arguments("here", {"seed": 1})[1] == {"model": str(tmp_path / "here"), "seed": 1}
    assert cluster.worker_arguments("org/model", {"tokenizer": "here"})[1]["tokenizer"] == str(tmp_path / "here")


def test_a_rows_prompt():
    messages = [{"role": "user", "content": "x", "name": None}]
    assert prompt_of({"messages": messages, "prompt": "y"}) == {"messages": [{"role": "user", "content": "x"}]}
    assert prompt_of({"messages": None, "prompt": "y"}) == "y"
    assert prompt_of({"prompt": "y", "tokenized_prompt": (1, 2)}) == {"prompt_token_ids": [1, 2]}
    with pytest.raises(ValidationError, match="a row needs 'messages', 'prompt' .*; it has text, id"):
        prompt_of({"text": "x", "id": 1})


def test_a_rows_parameters():
    assert params_of({}) is None
    assert params_of({"sampling_params": {"max_tokens": 3, "top_p": None}}) == SamplingParams(max_tokens=3)
    with pytest.raises(ValidationError, match="n must be 1"):
        params_of({"sampling_params": SamplingParams(n=2)})


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"concurrency": (2, 1)}, {"max_concurrent_batches": 0}])
def test_a_processors_configuration_is_checked(wrong):
    with pytest.raises(ValidationError):
        EngineProcessorConfig(model_source="model", **wrong)
