"""Plans by the real compiler for GPUs that are not there: exact, and near what is estimated without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.large_models import LLAMA_31_8B, QWQ_32B

import jaxllm
from jaxllm import Plan
from jaxllm.api.errors import ValidationError
from jaxllm.parallel.collectives import expected_collectives
from jaxllm.planning import api
from jaxllm.planning.estimate import FACTOR
from jaxllm.runner.compile.deviceless import find_compiler

from .compiling import QUICK

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="`make compile-cuda` installs the compiler")

GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "torch_dtype": "bfloat16",
}


#: [fields of the model's config, the plan's arguments]; a quick run compiles the first half
FITTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-l4": (
        LLAMA_31_8B,
        {"device": "l4", "max_model_len": 8192, "max_num_batched_tokens": 2048, "max_num_seqs": 64},
    ),
    "gemma-2xh200": (GEMMA, {"device": "h200", "tensor_parallel_size": 2}),
    "llama-a100": (LLAMA_31_8B, {"device": "a100-80g", "max_model_len": 16384}),
    "qwq-8xb200": (QWQ_32B, {"device": "b200", "tensor_parallel_size": 8, "max_model_len": 32768, "max_num_seqs": 256}),
}
#: what does not fit on one card; QwQ is what vLLM's second tuning guide meets
TOO_LARGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-l4": (
        {**LLAMA_31_8B, "num_hidden_layers": 8, "max_position_embeddings": 2**20},
        {"device": "l4", "max_model_len": 2**20, "max_num_seqs": 16},
    ),
    "qwq-h100": (QWQ_32B, {"device": "h100", "max_model_len": 131072}),
}


def some(plans: dict[str, Any]) -> list[Any]:
    """Parameters of a test: all plans, or the first half in a quick run."""
    chosen = list(plans.items())[: len(plans) // 2 if QUICK else None]
    return [pytest.param(*plan, id=name) for name, plan in chosen]


def both(folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], **arguments: Any) -> tuple[Plan, Plan]:
    """The plan by the compiler, and the estimate."""
    (folder / "config.json").write_text(json.dumps(fields))
    compiled = jaxllm.plan(folder, **arguments)
    monkeypatch.setattr(api, "find_compiler", lambda folder: None)
    estimated = jaxllm.plan(folder, **arguments)
    assert compiled.exact and "Compiled for NVIDIA" in compiled.basis
    assert not estimated.exact and "ESTIMATE" in estimated.basis
    return compiled, estimated


@pytest.mark.parametrize(("fields", "arguments"), some(FITTING))
def test_an_estimate_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], arguments: dict[str, Any]
):
    compiled, estimated = both(tmp_path, monkeypatch, fields, **arguments)
    assert compiled.fits and estimated.fits
    assert 1 / FACTOR < estimated.memory.activation_bytes / compiled.memory.activation_bytes < FACTOR
    exact = ("weight_bytes", "state_bytes", "kv_bytes_per_token", "total_bytes", "max_model_len")
    assert all(getattr(compiled.memory, name) == getattr(estimated.memory, name) for name in exact)
    devices = arguments.get("tensor_parallel_size", 1)
    assert compiled.collectives == estimated.collectives
    slices = -(-compiled.memory.max_num_seqs // 256)
    assert compiled.collectives == expected_collectives(fields["num_hidden_layers"], devices, slices=slices)


@pytest.mark.parametrize(("fields", "arguments"), some(TOO_LARGE))
def test_what_does_not_fit_on_one_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], arguments: dict[str, Any]
):
    """The remedies are planned by the compiler too."""
    compiled, estimated = both(tmp_path, monkeypatch, fields, **arguments)
    assert not compiled.fits
    values = [{remedy.argument: remedy.value for remedy in plan.remedies} for plan in (compiled, estimated)]
    assert all(set(found) == {"max_model_len", "tensor_parallel_size"} for found in values)
    assert all(found["tensor_parallel_size"] == 2 for found in values)
    assert float(values[0]["max_model_len"]) == pytest.approx(float(values[1]["max_model_len"]), rel=0.2)
    assert all(remedy.plan.max_concurrency >= 1 for remedy in compiled.remedies)


def test_what_the_compiler_is_not_asked(tmp_path: Path):
    """Errors of the process with the compiler are those of this one."""
    (tmp_path / "config.json").write_text(json.dumps(QWQ_32B))
    with pytest.raises(ValidationError, match="What would work: 1, 2, 4, 8"):
        jaxllm.plan(tmp_path, device="h200", tensor_parallel_size=3)
