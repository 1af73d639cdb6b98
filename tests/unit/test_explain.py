"""`jaxllm explain`: layouts, steps and exchanges by the formulas, without a compiler for the devices."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.large_models import LLAMA_3_8B
from support.tiny_model import SMALL, write_tiny_model

import jaxllm
from jaxllm import LLM, Explanation
from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPUS
from jaxllm.config.links import LINKS, Link, exchange_seconds
from jaxllm.entrypoints.cli import main
from jaxllm.planning import api
from jaxllm.planning.layout import KV_CACHE

#: Llama 3.3 70B's sizes
LLAMA: dict[str, Any] = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
ASKED: dict[str, Any] = {"device": "h100", "tensor_parallel_size": 4, "max_num_seqs": 128}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have one."""
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture(scope="module")
def llama(model: Path) -> Explanation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "find_compiler", lambda folder: None)
        return jaxllm.explain(model, **ASKED)


def test_every_gpu_has_a_link():
    assert LINKS.keys() == GPUS.keys()


@pytest.mark.parametrize(
    ("kind", "size", "steps", "sent"),
    [
        # a ring of four; bytes that the collective gives a device -> bytes that each sends
        ("all-reduce", 2**30, 6, 2 * 2**30 * 3 / 4),
        ("all-gather", 2**30, 3, 2**30 * 3 / 4),
        ("reduce-scatter", 2**28, 3, 2**30 * 3 / 4),
        ("all-to-all", 2**30, 3, 2**30 * 3 / 4),
        ("collective-permute", 2**30, 1, 2**30),
    ],
)
def test_large_exchanges_take_what_the_links_allow(kind: str, size: int, steps: int, sent: float):
    link = Link(name="a link", bandwidth=1e11, small_step=1e-6, large_step=2e-6)
    assert exchange_seconds(kind, size, 4, link) == pytest.approx(8.4e-6 + steps * 2e-6 + sent / 1e11)
    assert exchange_seconds(kind, size, 1, link) == 0


def test_small_exchanges_take_a_latency():
    """NCCL's numbers: an all-reduce of 16 KiB on eight H100 is 6.6 + 14 * 0.6 us, and a little to send it."""
    seconds = exchange_seconds("all-reduce", 2**14, 8, LINKS["h100"])
    assert seconds == pytest.approx(15e-6 + 2 * 2**14 * 7 / 8 * 4 / 450e9)


def test_arrays_lie_as_megatron_has_them(llama: Explanation):
    layouts = {layout.name: layout for layout in llama.layouts}
    qkv, down, norm, cache = (layouts[name] for name in ("layers.qkv", "layers.down", "norm", KV_CACHE))
    # one entry for 80 arrays of one layer each; a quarter of the rows, and of the columns
    assert qkv.count == 80 and qkv.shape == (1, 10240, 8192) and qkv.device_shape == (1, 2560, 8192)
    assert qkv.mesh_axes == (None, "tensor", None) and qkv.device_bytes == 80 * 2560 * 8192 * 2
    assert down.device_shape == (1, 8192, 7168) and down.mesh_axes == (None, None, "tensor")
    assert norm.device_shape == norm.shape == (8192,) and not norm.is_split
    assert cache.device_shape == (cache.shape[0], 4, 16, 128) and cache.shape[1] == 16
    assert cache.device_bytes == math.prod(cache.device_shape) * 2 == llama.plan.memory.kv_cache_bytes
    weights = sum(layout.device_bytes for layout in llama.layouts) - cache.device_bytes
    assert weights == llama.plan.memory.weight_bytes
    sizes = {"tensor": 4}
    assert qkv.part(sizes, {"tensor": 1}) == "heads 16 to 31 of 64, kv_heads 2 to 3 of 8"
    assert norm.part(sizes, {"tensor": 1}) == "all of it"


def test_what_does_not_divide_is_noted(model: Path):
    layouts = {layout.name: layout for layout in jaxllm.explain(model, device="h200", tensor_parallel_size=16).layouts}
    assert layouts["layers.qkv"].note({"tensor": 16}) == "neighbours share heads"
    assert layouts["layers.qkv"].part({"tensor": 16}, {"tensor": 3}) == "heads 12 to 15 of 64, kv_heads 1 to 1 of 8"
    assert layouts["head"].note({"tensor": 16}) == ""


def test_steps_take_what_the_roofline_says(llama: Explanation):
    names = [(step.name, step.tokens, step.requests) for step in llama.steps]
    assert names == [
        ("decode, one request", 1, 1),
        ("decode, all requests", 128, 128),
        ("largest step", llama.plan.memory.max_num_batched_tokens, 128),
    ]
    d, f, layers, words = 8192, 28672, 80, 128256
    matrices = layers * (10240 * d + d * d + 3 * d * f) // 4
    norms = (2 * layers + 1) * d
    for step in llama.steps:
        # the table of vectors is looked up in, not read
        assert step.weight_bytes == 2 * (matrices + words * d // 4 + norms)
        assert step.flops == 2 * (step.tokens * matrices + step.requests * words * d // 4)
        assert step.read_seconds == pytest.approx(step.weight_bytes / 3.35232e12)
        assert step.compute_seconds == pytest.approx(step.flops / 989.4e12)
        sums, logits = step.exchanges if step.tokens > 128 else sorted(step.exchanges, key=lambda each: each.kind)[::-1]
        assert (sums.kind, sums.times, sums.times_a_layer, sums.bytes) == ("all-reduce", 161, 2, step.tokens * d * 2)
        assert (logits.kind, logits.times, logits.bytes) == ("all-gather", 1, step.requests * words * 4)
        exchanged = 161 * exchange_seconds("all-reduce", sums.bytes, 4, LINKS["h100"])
        exchanged += exchange_seconds("all-gather", logits.bytes, 4, LINKS["h100"])
        assert step.exchange_seconds == pytest.approx(exchanged)
        assert step.read_seconds is not None and step.compute_seconds is not None
        assert step.seconds == pytest.approx(max(step.read_seconds, step.compute_seconds) + exchanged)
    # a decode step waits for the memory, a long prompt for the products
    (read, computed), (long_read, long_computed) = (
        (step.read_seconds or 0.0, step.compute_seconds or 0.0) for step in (llama.steps[0], llama.steps[-1])
    )
    assert read > 100 * computed > 0 and long_computed > long_read


def test_what_is_not_compiled_is_said(llama: Explanation):
    text = str(llama)
    assert not llama.plan.exact and all(step.not_compiled for step in llama.steps)
    assert "This is an ESTIMATE from shapes" in text and "pip install --no-deps" in text
    assert text.count("by the rules of the split, since there is nothing to compile with") == 3
    assert "Mesh: tensor=4, each pair connected by NVLink 4, 450 GB/s in each direction" in text


def test_one_device_exchanges_nothing(model: Path):
    one = jaxllm.explain(model, device="b200")
    assert all(not step.exchanges for step in one.steps) and "Mesh: one device" in str(one)
    assert not any(layout.is_split for layout in one.layouts)


def test_replicas_have_devices_of_their_own(model: Path, llama: Explanation):
    two = jaxllm.explain(model, **ASKED, data_parallel_size=2)
    assert two.mesh == {"data": 2, "tensor": 4} and two.layouts == llama.layouts and two.steps == llama.steps
    assert "Mesh: data=2 x tensor=4" in str(two) and "Steps of a replica" in str(two)
    drawn = two._repr_html_()
    assert drawn.count("<text") == 8 and ">data 1, tensor 3</text>" in drawn
    assert drawn.count("80 x layers.output: heads 48 to 63 of 64 (2.500 GiB)") == 2


def test_stages_have_their_layers_and_hand_on_hidden_states(model: Path, llama: Explanation):
    two = jaxllm.explain(model, **ASKED, pipeline_parallel_size=2)
    assert two.mesh == {"stage": 2, "tensor": 4}
    counts = {(layout.stage, layout.name): layout.count for layout in two.layouts}
    assert counts[0, "layers.qkv"] == counts[1, "layers.qkv"] == 40
    ends = {(stage, name) for stage, name in counts if name in ("embedding", "norm", "head")}
    assert ends == {(0, "embedding"), (1, "norm"), (1, "head")}
    largest = max(stage for stage, _ in counts if stage is not None)
    sizes = [sum(each.device_bytes for each in two.layouts if each.stage == stage) for stage in range(largest + 1)]
    planned = two.plan.memory
    assert sizes[planned.stage] == planned.weight_bytes + planned.kv_cache_bytes
    for whole in llama.steps:
        first, last = (step for step in two.steps if step.name == whole.name)
        assert first.weight_bytes + last.weight_bytes == whole.weight_bytes
        assert first.flops + last.flops == whole.flops
        handed = whole.tokens * 8192 * 2
        sums = {step.stage: [(e.kind, e.times, e.bytes) for e in step.exchanges] for step in (first, last)}
        assert sums[0] == [("all-reduce", 81, handed), ("copy to the next stage", 1, handed)]
        assert ("all-reduce", 80, handed) in sums[1] and [kind for kind, *_ in sums[1]].count("all-gather") == 1
    text, drawn = str(two), two._repr_html_()
    assert "stage 1: decode, one request (1 token): at least" in text and "Mesh: stage=2 x tensor=4" in text
    assert drawn.count("head: vocab 0 to 32063 of 128256") == 1 and drawn.count("activations (") == 4


@pytest.mark.parametrize("whole", [False, True])
def test_experts_are_read_by_those_that_choose_them(tmp_path: Path, whole: bool):
    """Mixtral 8x7B on two devices, which have a half of each expert, or four experts each."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    fields = {**LLAMA, **sizes, **heads, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = jaxllm.explain(tmp_path, device="h100", tensor_parallel_size=2, enable_expert_parallel=whole)
    [gate_up] = (each for each in found.layouts if each.name.endswith("experts.gate_up"))
    assert gate_up.shape == (1, 8, 28672, 4096) and gate_up.count == 32
    assert gate_up.device_shape == ((1, 4, 28672, 4096) if whole else (1, 8, 14336, 4096))
    if whole:
        assert gate_up.part(found.mesh, {"tensor": 1}) == "experts 4 to 7 of 8"
    d, f, layers = 4096, 14336, 32
    experts = layers * 8 * 3 * d * f // 2
    router = layers * 8 * d
    others = layers * (6144 * d + d * d) // 2 + router
    first = found.steps[0]
    head, norms = 32000 * d // 2, (2 * layers + 1) * d
    assert first.weight_bytes == 2 * (experts // 4 + others + head + norms)
    assert first.flops == 2 * (experts // 4 + others + head)
    # of very many tokens somebody goes to each expert
    assert found.steps[-1].weight_bytes == 2 * (experts + others + head + norms)
    assert "experts" in found._repr_html_()


def test_what_does_not_fit_is_explained_all_the_same(model: Path):
    one = jaxllm.explain(model, device="h100")
    assert not one.plan.fits and not one.plan.remedies and one.layouts
    assert "`jaxllm plan` finds what would make it fit" in str(one)


def test_a_model_that_pools_has_no_logits(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "architectures": ["LlamaModel"]}))
    found = jaxllm.explain(tmp_path, device="h100", tensor_parallel_size=4)
    [step] = found.steps
    assert step.name == "largest step" and [exchange.kind for exchange in step.exchanges] == ["all-reduce"]


def test_numbers_survive_json(llama: Explanation):
    assert Explanation.from_dict(json.loads(json.dumps(llama.to_dict()))) == llama


def test_the_command_prints_it(model: Path, llama: Explanation, capsys: pytest.CaptureFixture[str]):
    argv = ["explain", str(model), "--device", "h100", "-tp", "4", "--max-num-seqs", "128"]
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(llama)
    assert main([*argv, "--json"]) == 0
    assert Explanation.from_dict(json.loads(capsys.readouterr().out)) == llama


def test_a_notebook_draws_every_device(llama: Explanation):
    html = llama._repr_html_()
    drawn = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    titles = [title.text or "" for title in drawn.iter("title")]
    assert [text.text for text in drawn.iter("text")] == ["tensor 0", "tensor 1", "tensor 2", "tensor 3"]
    assert len(titles) == 4 * (len(llama.layouts) + 3)
    assert "80 x layers.output: heads 48 to 63 of 64 (2.500 GiB)" in titles
    heights = [float(rectangle.get("height", "")) for rectangle in drawn.iter("rect")]
    assert sum(heights) == pytest.approx(4 * 220, abs=1)


def test_text_is_no_markup(llama: Explanation):
    named = dataclasses.replace(llama, plan=dataclasses.replace(llama.plan, basis="<script>"))
    assert "<script>" not in named._repr_html_() and "&lt;script&gt;" in named._repr_html_()


def test_the_null_model_has_nothing_to_explain(tmp_path: Path):
    with (
        LLM(write_tiny_model(tmp_path), load_format="null", **SMALL) as llm,
        pytest.raises(ValidationError, match="nothing to explain"),
    ):
        llm.explain()


def test_a_model_that_drafts_stays_on_the_device(model: Path, tmp_path: Path):
    """Also one of more layers than the model whose layers lie on the host."""
    config = json.loads((model / "config.json").read_text())
    deeper = {**config, "num_hidden_layers": config["num_hidden_layers"] + 3}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    drafts = {"model": str(tmp_path), "num_speculative_tokens": 3}
    found = jaxllm.explain(model, device="h100", cpu_offload_gb=4.0, speculative_config=drafts)
    on_host = {layout.name for layout in found.layouts if layout.on_host}
    assert "layers.qkv" in on_host and not [name for name in on_host if name.startswith("draft.")]
    assert "draft.layers.qkv" in {layout.name for layout in found.layouts}


def test_adapters_are_arrays_of_it(model: Path):
    """Split as their matrices are: A along its inputs, B along its outputs."""
    found = jaxllm.explain(model, **ASKED, enable_lora=True, max_loras=3)
    own = {layout.name: layout for layout in found.layouts if layout.name.startswith("adapters.")}
    assert set(own) == {f"adapters.{name}.{half}" for name in ("qkv", "output", "gate_up", "down") for half in "ab"}
    # the plan has one more, on its way
    assert sum(layout.device_bytes for layout in own.values()) * 4 == found.plan.memory.adapter_bytes * 3
    down = own["adapters.down.a"], own["adapters.down.b"]
    counts = [layout.count for layout in down]
    assert counts == [80, 80] and [layout.device_shape for layout in down] == [(1, 3, 16, 7168), (1, 3, 16, 8192)]
    assert own["adapters.qkv.b"].device_shape == (1, 3, 16, 2048 + 2 * 256)
    assert "adapters.gate_up.a" in str(found) and "of it LoRA" in str(found)
