"""``jaxllm bench throughput`` with random images, as vLLM's dataset random-mm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.seeing_models import write_seeing_model

from jaxllm.entrypoints.cli import main

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.thorough


def test_images_a_second_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_seeing_model(tmp_path, "gemma3")
    options = [
        *(
            "--model",
            str(model),
            "--dtype",
            "float32",
            "--max-model-len",
            "144",
            "--max-num-seqs",
            "4",
            "--enforce-eager",
        ),
        *("--dataset-name", "random-mm", "--num-prompts", "3", "--input-len", "20", "--output-len", "4"),
        *("--random-mm-base-items-per-request", "2", "--num-iters", "1", "--output-json", str(tmp_path / "out.json")),
        *("--random-mm-bucket-config", "{(20, 30, 1): 1, (40, 10, 1): 1}"),
    ]
    assert main(["bench", "throughput", *options]) == 0
    assert "images/s, 6 in all" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["num_images"] == 6 and case["medians"]["images_per_s"] > 0
    beside = options[: options.index("--dataset-name")]
    beside += ["--input-len", "12", "--output-len", "4", "--batch-size", "3", "--num-images", "2", "--image-size", "30"]
    beside += ["--num-iters", "1", "--output-json", str(tmp_path / "own.json")]
    assert main(["bench", "images", *beside]) == 0
    assert "ms beside images" in capsys.readouterr().out
    told = json.loads((tmp_path / "own.json").read_text())
    assert all(seconds > 0 for seconds in told["medians"].values()) and len(told["launches"]) == 2
    for wrong, why in (("{(1, 2, 3): 1}", "pictures alone"), ("no dict", "must be such as")):
        assert main(["bench", "throughput", *options[:-1], wrong]) != 0
        assert why in capsys.readouterr().err


def test_a_model_that_sees_none_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model", str(tiny_model), "--max-model-len", "64", "--max-num-seqs", "2", "--enforce-eager"]
    assert main(["bench", "images", *options, "--input-len", "8", "--output-len", "2", "--batch-size", "1"]) == 1
    assert f"{tiny_model} sees no images" in capsys.readouterr().err
