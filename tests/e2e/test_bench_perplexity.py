"""``jaxllm bench perplexity`` against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_model import SMALL, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from jaxllm.engine.engine import Engine
from jaxllm.entrypoints.cli import main


def test_perplexity_is_transformers(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Two windows of 24 bytes and one of 12; eight bits cost something, and the weights are smaller."""
    waited: list[Engine] = []
    monkeypatch.setattr(Engine, "wait_until_ready", lambda self: waited.append(self))
    text = bytes(np.random.default_rng(0).integers(97, 123, 60).tolist()).decode()
    (tmp_path / "text").write_text(text)
    options = [f"--{name.replace('_', '-')}={SMALL[name]}" for name in ("dtype", "max_num_batched_tokens")]
    where = ["--model", str(tiny_model), "--text", str(tmp_path / "text"), "--output-json", str(tmp_path / "found")]
    swept = ["--context", "24", "--sweep-quantization", "none,int8", "--kv-cache-memory-bytes", "8M", "--enforce-eager"]
    swept += ["--sweep-model", str(tiny_model)]
    assert main(["bench", "perplexity", *where, *swept, *options]) == 0
    assert len(waited) == 3, "no program is compiled beside what is measured"
    found = json.loads((tmp_path / "found").read_text())
    peer = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype=torch.float32)
    assert peer.config.vocab_size == VOCAB_SIZE
    ids = peer_ids(tiny_model, text)
    assert found["none"]["tokens"] == 57
    assert found["none"]["perplexity"] == pytest.approx(perplexity_of(peer, ids), rel=1e-4)
    assert found["int8"]["perplexity"] == pytest.approx(found["none"]["perplexity"], rel=0.05)
    assert found["int8"]["perplexity"] != found["none"]["perplexity"]
    assert found["int8"]["weight_bytes"] < found["none"]["weight_bytes"] * 0.7
    assert found[tiny_model.name]["perplexity"] == found["none"]["perplexity"]
    assert f"{'int8':16} perplexity" in capsys.readouterr().out
    # the weights alone say the same, but for what an engine rounds
    alone = ["--output-json", str(tmp_path / "alone"), "--weights-alone"]
    assert main(["bench", "perplexity", *where, *swept, *options, *alone]) == 0
    weights = json.loads((tmp_path / "alone").read_text())
    for form in ("none", "int8"):
        assert weights[form]["perplexity"] == pytest.approx(found[form]["perplexity"], rel=1e-4)
    assert weights["int8"]["weight_bytes"] < weights["none"]["weight_bytes"] * 0.7
    # of a model as the arguments have it
    other = [*where, *options, "--context=24", "--hf-overrides", '{"rms_norm_eps": 0.5}', "--output-json"]
    assert main(["bench", "perplexity", *other, str(tmp_path / "other"), "--weights-alone"]) == 0
    changed = json.loads((tmp_path / "other").read_text())
    norms: list[Any] = [module for module in peer.modules() if hasattr(module, "variance_epsilon")]
    for norm in norms:
        norm.variance_epsilon = 0.5
    assert changed["none"]["perplexity"] == pytest.approx(perplexity_of(peer, ids), rel=1e-4)
    # what is in the file is not measured again, and windows that are missing are; of the same text alone
    cut = {**found, "int8": {"windows": found["int8"]["windows"][:2]}}
    (tmp_path / "found").write_text(json.dumps(cut))
    assert main(["bench", "perplexity", *where, *swept, *options, "--resume"]) == 0
    again = json.loads((tmp_path / "found").read_text())
    assert again["none"] == found["none"] and len(again["int8"]["windows"]) == 3
    assert again["int8"]["perplexity"] == pytest.approx(found["int8"]["perplexity"], rel=1e-6)
    assert main(["bench", "perplexity", *where, *swept, *options, "--resume", "--context", "12"]) == 1
    assert "was measured with context 24, and 12 is asked for" in capsys.readouterr().err
    assert main(["bench", "perplexity", *where, *swept, *options, "--resume", "--dtype", "bfloat16"]) == 1
    assert "was measured with dtype 'float32', and 'bfloat16' is asked for" in capsys.readouterr().err
    overrides = ["--resume", "--hf-overrides", '{"rms_norm_eps": 0.5}']
    assert main(["bench", "perplexity", *where, *swept, *options, *overrides]) == 1
    assert "was measured with hf_overrides None, and {'rms_norm_eps': 0.5} is asked for" in capsys.readouterr().err
    # whose model is not on the command line
    (tmp_path / "config.json").write_text(json.dumps({"model": str(tiny_model)}))
    assert main(["bench", "perplexity", "--config", str(tmp_path / "config.json"), *where[2:], "--resume"]) == 1
    assert f"was measured with model {str(tiny_model)!r}, and None is asked for" in capsys.readouterr().err


def perplexity_of(peer: Any, ids: list[int]) -> float:
    losses: list[float] = []
    for window in (ids[:24], ids[24:48], ids[48:]):
        with torch.no_grad():
            scores = torch.log_softmax(peer(torch.tensor([window])).logits[0].double(), -1)
        losses += [-float(scores[place, token]) for place, token in enumerate(window[1:])]
    assert len(losses) == 57
    return math.exp(np.mean(losses))


def peer_ids(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)
