"""``jaxllm bench throughput`` with random images, as vLLM's dataset random-mm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_square_model import write_tiny_square_model

from jaxllm.entrypoints.cli import main

pytest.importorskip("torch")
pytest.importorskip("PIL")
pytestmark = pytest.mark.thorough


def test_images_a_second_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_tiny_square_model(tmp_path, "gemma3")
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
    for wrong, why in (("{(1, 2, 3): 1}", "pictures alone"), ("no dict", "must be such as")):
        assert main(["bench", "throughput", *options[:-1], wrong]) != 0
        assert why in capsys.readouterr().err
