"""`jaxllm plan`: what it says of devices that are not there, without their compiler, and of those that are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.large_models import QWQ_32B
from support.tiny_model import CONFIG, SMALL, write_tiny_model

import jaxllm
from jaxllm import LLM, Plan
from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import DEVICE_NAMES, GPUS
from jaxllm.entrypoints.cli import main
from jaxllm.planning import api
from jaxllm.runner.compile import target
from jaxllm.runner.compile.deviceless import CudaCompiler

GIB = 2**30


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have one."""
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)


@pytest.fixture
def qwq(tmp_path: Path) -> Path:
    return config(tmp_path, QWQ_32B)


def config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def weights(fields: dict[str, Any], size: int) -> int:
    """Bytes of a Llama-like model's matrices, without its norms and biases; the oracle."""
    d, f, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    heads, kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim = fields.get("head_dim", d // heads)
    attention = 2 * d * heads * dim + 2 * d * kv * dim
    return size * (layers * (attention + 3 * d * f) + 2 * fields["vocab_size"] * d)


class TestQwQ:
    """The story of vLLM's second tuning guide: 32B on one card of 80 GB, 131,072 tokens long."""

    @pytest.mark.parametrize("device", ["h100", "a100-80g"])
    def test_it_does_not_fit_and_the_values_that_are_named_do(self, qwq: Path, device: str):
        plan = jaxllm.plan(qwq, device=device, max_model_len=131072)
        assert not plan.fits and not plan.exact
        assert "131072" in plan.problem and "32.004 GiB" in plan.problem
        assert plan.memory.weight_bytes == pytest.approx(weights(QWQ_32B, 2), rel=1e-3)
        # 64 layers, keys and values, 8 heads of 128, bfloat16
        assert plan.memory.kv_bytes_per_token == 64 * 2 * 8 * 128 * 2
        values = {remedy.argument: remedy.value for remedy in plan.remedies}
        assert set(values) == {"max_model_len", "quantization", "cpu_offload_gb", "tensor_parallel_size"}
        assert (values["tensor_parallel_size"], values["quantization"]) == (2, "int8")
        # of the 32 GiB that one request needs, these are not there
        assert values["cpu_offload_gb"] == pytest.approx((131072 - int(values["max_model_len"])) * 2**18 / GIB, abs=3)
        length = int(values["max_model_len"])
        assert 20_000 < length < 40_000
        for argument, value in values.items():
            again = jaxllm.plan(qwq, device=device, **{"max_model_len": 131072, argument: value})
            assert again.fits and not again.remedies and not again.problem
            assert again.memory.max_concurrency >= 1
            assert again.memory in [remedy.plan for remedy in plan.remedies]
        text = str(plan)
        assert f"max_model_len={length}: " in text and "tensor_parallel_size=2: " in text
        assert "ESTIMATE" in text and "pip install --no-deps" in text

    def test_two_cards_have_half_of_it_each(self, qwq: Path):
        one, two = (jaxllm.plan(qwq, device="h200", tensor_parallel_size=n).memory for n in (1, 2))
        assert two.weight_bytes == pytest.approx(one.weight_bytes / 2, rel=1e-3)
        assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token

    def test_more_devices_than_kv_heads_repeat_them(self, tmp_path: Path):
        folder = config(tmp_path, {**QWQ_32B, "num_attention_heads": 64, "hidden_size": 8192, "num_key_value_heads": 4})
        four, eight = (jaxllm.plan(folder, device="b200", tensor_parallel_size=n).memory for n in (4, 8))
        assert four.kv_bytes_per_token == eight.kv_bytes_per_token == 64 * 2 * 128 * 2

    def test_a_step_of_a_split_model_exchanges_two_sums_a_layer(self, qwq: Path):
        assert jaxllm.plan(qwq, device="h200").collectives == {}
        # logits are gathered in blocks of 256 rows
        many = jaxllm.plan(qwq, device="h200", tensor_parallel_size=8, max_num_seqs=1024)
        assert many.collectives == {"all-reduce": 2 * 64 + 1, "all-gather": 4}
        plan = jaxllm.plan(qwq, device="h200", tensor_parallel_size=8, max_num_seqs=256)
        assert plan.collectives == {"all-reduce": 2 * 64 + 1, "all-gather": 1}
        assert "Each of 8 devices" in str(plan) and "129 all-reduce, 1 all-gather" in str(plan)

    def test_a_length_of_minus_one_is_fitted(self, qwq: Path):
        plan = jaxllm.plan(qwq, device="h100", max_model_len=-1)
        assert plan.fits and plan.memory.max_model_len < 40_000

    def test_a_larger_share_of_the_memory_helps_where_it_does(self, qwq: Path):
        plan = jaxllm.plan(qwq, device="h100", max_model_len=16384, gpu_memory_utilization=0.8)
        shares = [float(remedy.value) for remedy in plan.remedies if remedy.argument == "gpu_memory_utilization"]
        assert not plan.fits and len(shares) == 1
        assert jaxllm.plan(qwq, device="h100", max_model_len=16384, gpu_memory_utilization=shares[0]).fits

    def test_a_smaller_dtype_helps_where_it_does(self, qwq: Path):
        plan = jaxllm.plan(qwq, device="b200", dtype="float32", gpu_memory_utilization=0.7)
        assert not plan.fits
        assert "dtype" in {remedy.argument for remedy in plan.remedies}
        assert jaxllm.plan(qwq, device="b200", dtype="bfloat16", gpu_memory_utilization=0.7).fits

    def test_fewer_tokens_a_step_help_where_they_do(self, qwq: Path):
        asked: dict[str, Any] = {"device": "h100", "max_model_len": 32768, "max_num_seqs": 64}
        plan = jaxllm.plan(qwq, **asked, max_num_batched_tokens=16384)
        tokens = [int(remedy.value) for remedy in plan.remedies if remedy.argument == "max_num_batched_tokens"]
        assert not plan.fits and len(tokens) == 1
        assert jaxllm.plan(qwq, **asked, max_num_batched_tokens=tokens[0]).fits

    def test_a_given_number_of_blocks_is_corrected(self, qwq: Path):
        plan = jaxllm.plan(qwq, device="h200", max_model_len=16384, num_gpu_blocks_override=100)
        values = {remedy.argument: remedy.value for remedy in plan.remedies}
        assert values["num_gpu_blocks_override"] == 16384 // 16 + 1 and values["max_model_len"] == 99 * 16
        # a plan that is refused has its activations all the same
        assert plan.memory.activation_bytes > GIB


def test_a_pipeline_is_planned_by_the_stage_with_the_least_room(qwq: Path, capsys: pytest.CaptureFixture[str]):
    """The first or the last one, which have a table of the vocabulary besides their layers; or one of more layers."""
    arguments: dict[str, Any] = {"device": "h200", "max_model_len": 8192, "pipeline_parallel_size": 4}
    memory = jaxllm.plan(qwq, **arguments).memory
    table = QWQ_32B["vocab_size"] * QWQ_32B["hidden_size"] * 2
    assert memory.weight_bytes == pytest.approx((weights(QWQ_32B, 2) - 2 * table) / 4 + table, rel=1e-3)
    assert re.search("stage [14] of 4, which has the least room", str(memory))
    assert memory.kv_bytes_per_token == 16 * 2 * 8 * 128 * 2
    uneven = jaxllm.plan(qwq, **arguments, pipeline_layer_partition="16,16,20,12").memory
    assert "stage 3 of 4" in str(uneven) and uneven.num_blocks < memory.num_blocks
    assert main(["plan", str(qwq), "--device=h200", "-pp", "4", "--max-model-len=8192"]) == 0
    assert str(memory) in capsys.readouterr().out


@pytest.mark.parametrize("device", GPUS)
def test_every_device_holds_a_model_that_is_small(tmp_path: Path, device: str):
    plan = jaxllm.plan(config(tmp_path, CONFIG), device=device)
    assert plan.fits and plan.device == device
    assert plan.memory.total_bytes == GPUS[device].memory_bytes and GPUS[device].description in str(plan)


@pytest.mark.parametrize(("device", "limits"), [("a100-80g", (8192, 256)), ("h100", (16384, 1024))])
def test_a_plan_has_the_devices_default_limits(tmp_path: Path, device: str, limits: tuple[int, int]):
    memory = jaxllm.plan(config(tmp_path, QWQ_32B), device=device, max_model_len=8192).memory
    assert (memory.max_num_batched_tokens, memory.max_num_seqs) == limits


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "the blocks are rounded"),
        ({"max_num_seqs": 1}, "max_num_seqs requests of max_model_len tokens fit"),
        ({"num_gpu_blocks_override": 2000}, "num_gpu_blocks_override leaves it"),
        ({"kv_cache_memory_bytes": "9G"}, "kv_cache_memory_bytes leaves it"),
    ],
)
def test_the_lines_add_up_to_what_may_be_used(qwq: Path, arguments: dict[str, Any], why: str):
    plan = jaxllm.plan(qwq, device="h200", max_model_len=32768, gpu_memory_utilization=0.8, **arguments)
    text = str(plan)
    sizes = [float(size) for size in re.findall(r"^  [a-zA-Z ]+? +(\d+\.\d+) GiB", text, re.MULTILINE)]
    usable = 0.8 * plan.memory.total_bytes / GIB
    assert len(sizes) == 5 and sum(sizes) == pytest.approx(usable, abs=0.003)
    assert f"(of {usable:.3f}; {why}" in text and plan.memory.unused_bytes > 0


class TestModels:
    def test_a_config_by_itself(self, tmp_path: Path):
        fields = config(tmp_path, QWQ_32B) / "config.json"
        alone = tmp_path / "anything.json"
        alone.write_bytes(fields.read_bytes())
        found = [jaxllm.plan(path, device="h200").memory for path in (tmp_path, fields, alone, str(alone))]
        assert all(plan == found[0] for plan in found)

    def test_a_config_that_is_none(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValidationError, match="is not JSON"):
            jaxllm.plan(tmp_path / "config.json", device="h200")

    def test_no_model(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError):
            jaxllm.plan(tmp_path / "nothing", device="h200")

    def test_a_model_that_pools_is_split_and_exchanges_no_logits(self, tmp_path: Path):
        folder = config(tmp_path, {**QWQ_32B, "architectures": ["Qwen2Model"]})
        one, two = (jaxllm.plan(folder, device="h200", tensor_parallel_size=n) for n in (1, 2))
        assert one.fits and two.memory.weight_bytes < 0.51 * one.memory.weight_bytes
        assert one.collectives == {} and two.collectives == {"all-reduce": 2 * QWQ_32B["num_hidden_layers"] + 1}


class TestErrors:
    def test_an_unknown_device(self, qwq: Path):
        with pytest.raises(ValidationError) as raised:
            jaxllm.plan(qwq, device="h300")
        assert all(name in str(raised.value) for name in DEVICE_NAMES)

    @pytest.mark.parametrize(
        ("devices", "text"),
        [
            (3, "40 attention heads. What would work: 1, 2, 4, 8."),
            (5, "8 KV heads, nor is it a multiple of them. What would work: 1, 2, 4, 8."),
            (0, "at least 1, got 0"),
            ("two", "tensor_parallel_size"),
        ],
    )
    def test_devices_that_do_not_divide_the_model(self, qwq: Path, devices: Any, text: str):
        with pytest.raises(ValidationError, match=text.replace(".", r"\.")):
            jaxllm.plan(qwq, device="h200", tensor_parallel_size=devices)

    def test_arguments_are_checked_as_the_engine_does(self, qwq: Path):
        with pytest.raises(TypeError, match="max_model_len"):
            jaxllm.plan(qwq, device="h200", max_modell_len=5)
        with pytest.raises(ValidationError, match="Set max_model_len <= 131072"):
            jaxllm.plan(qwq, device="h200", max_model_len=131073)
        with pytest.raises(ValidationError, match="kv_cache_dtype"):
            jaxllm.plan(qwq, device="h200", kv_cache_dtype="nvfp4")
        with pytest.raises(ValidationError, match="null"):
            jaxllm.plan(qwq, device="h200", load_format="null")

    def test_more_devices_than_there_are(self, tmp_path: Path):
        jax.devices()  # a JAX that has not started would start with as many
        with pytest.raises(ValidationError, match="tensor_parallel_size=64 needs as many devices; JAX has"):
            jaxllm.plan(config(tmp_path, CONFIG), device="cpu", tensor_parallel_size=64)

    def test_a_compiler_that_fails_leaves_an_estimate_that_says_so(
        self, qwq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """In a process of its own, as always; there is no compiler in the folder."""
        monkeypatch.setattr(api, "find_compiler", lambda folder: CudaCompiler(folder=tmp_path / "none", cuda="12"))
        plan = jaxllm.plan(qwq, device="h200")
        assert not plan.exact and plan.fits
        assert f"{tmp_path / 'none'} failed (exit status 1: " in plan.basis and "estimate" in plan.basis


class TestHere:
    """On the CPU the engine's own programs are compiled, and the engine then plans the same."""

    def test_it_is_what_the_engine_plans(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        tiny_model = write_tiny_model(tmp_path)
        with caplog.at_level("INFO", "jaxllm"):
            plan = jaxllm.plan(tiny_model, device="cpu", **SMALL)
        # which takes a while
        assert "Compiling the engine's largest programs for cpu (32 tokens of 4 requests a step" in caplog.text
        with LLM(tiny_model, device="cpu", **SMALL) as llm:
            engine = llm.memory_plan
        assert plan.exact and plan.fits
        # what is available changes from moment to moment
        moment = {"total_bytes": 0, "unused_bytes": 0}
        assert dataclasses.replace(plan.memory, **moment) == dataclasses.replace(engine, **moment)
        assert str(plan).startswith("Memory plan on cpu")

    def test_what_makes_it_fit_is_compiled_too(self, tmp_path: Path):
        tiny_model = write_tiny_model(tmp_path)
        plan = jaxllm.plan(
            tiny_model, device="cpu", **{**SMALL, "max_num_seqs": 1}, block_size=16, num_gpu_blocks_override=9
        )
        values = {remedy.argument: remedy.value for remedy in plan.remedies}
        assert not plan.fits and values == {"max_model_len": 128, "num_gpu_blocks_override": 17}
        assert plan.exact and [remedy.plan.num_tokens for remedy in plan.remedies] == [128, 256]


class TestOneReadingOfMemory:
    """What is free on a CPU changes from moment to moment; a plan and its advice are of one moment."""

    #: 8 KiB a block of 16 tokens: too little for 512 of them, and weights, activations and state
    ARGUMENTS: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        "block_size": 16,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
    }

    @pytest.mark.thorough
    def test_the_values_that_are_named_hold(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        model = write_tiny_model(tmp_path)
        whole = jaxllm.plan(model, device="cpu", **self.ARGUMENTS).memory
        others = whole.weight_bytes + whole.activation_bytes + whole.state_bytes
        size = 2 * (others + 16 * whole.kv_cache_bytes // whole.num_blocks)
        readings = iter([size, *range(0, size, size // 9)])
        monkeypatch.setattr(target, "device_memory", lambda device: (next(readings),) * 2)
        plan = jaxllm.plan(model, device="cpu", **self.ARGUMENTS)
        assert not plan.fits and plan.memory.total_bytes == size
        assert {remedy.argument for remedy in plan.remedies} >= {"max_model_len", "gpu_memory_utilization"}
        assert "Any one of these makes it fit" in str(plan) and "Try" not in str(plan)
        monkeypatch.setattr(target, "device_memory", lambda device: (size, size))
        for remedy in plan.remedies[:2]:
            again = jaxllm.plan(model, device="cpu", **{**self.ARGUMENTS, remedy.argument: remedy.value})
            assert again.fits and again.memory == remedy.plan

    def test_a_larger_share_is_not_proposed_where_others_have_the_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(target, "device_memory", lambda device: (2**40, 2**19))
        with pytest.raises(ValidationError, match="increasing the device's free memory"):
            LLM(write_tiny_model(tmp_path), device="cpu", **self.ARGUMENTS)


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
        status = main(["plan", *argv])
        return status, capsys.readouterr().out

    def test_it_prints_the_plan(self, qwq: Path, capsys: pytest.CaptureFixture[str]):
        argv = "--device h200 --tensor-parallel-size 8 --max-model-len 32768 --max-num-seqs 256".split()
        status, text = self.run(capsys, str(qwq), *argv)
        assert status == 0
        assert "Maximum concurrency for 32,768 tokens per request" in text and "It fits." in text
        expected = jaxllm.plan(qwq, device="h200", tensor_parallel_size=8, max_model_len=32768, max_num_seqs=256)
        assert text.strip() == str(expected)
        assert self.run(capsys, "--model", str(qwq), "--device=h200", "-tp", "8", *argv[4:]) == (0, text)

    def test_json(self, qwq: Path, capsys: pytest.CaptureFixture[str]):
        status, text = self.run(capsys, str(qwq), "--device", "h100", "--json")
        assert status == 1
        plan = Plan.from_dict(json.loads(text))
        assert plan == jaxllm.plan(qwq, device="h100")
        assert json.loads(text)["remedies"][0]["argument"] == "max_model_len"

    def test_a_shipped_configuration(self, qwq: Path, capsys: pytest.CaptureFixture[str]):
        """What the configuration says of itself: about 53,000 tokens on one card, 300,000 on two."""
        for name, tokens in (("qwq-32b-80g", 53_000), ("qwq-32b-2x80g", 300_000)):
            status, text = self.run(capsys, str(qwq), "--config", name, "--device", "h100", "--json")
            assert status == 0
            assert Plan.from_dict(json.loads(text)).memory.num_tokens == pytest.approx(tokens, rel=0.1)

    def test_errors_are_told(self, qwq: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["plan", str(qwq), "--device", "h300"]) == 1
        assert "'h300' is not a device that jaxllm knows" in capsys.readouterr().err


def test_a_notebook_shows_it(qwq: Path):
    page = jaxllm.plan(qwq, device="h100")._repr_html_()
    assert "<svg" in page and "max_model_len=" in page


def test_numbers_survive_json(qwq: Path):
    plan = jaxllm.plan(qwq, device="h100")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert not any(isinstance(value, np.generic) for value in dataclasses.asdict(plan.memory).values())
