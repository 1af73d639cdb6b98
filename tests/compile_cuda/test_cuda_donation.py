"""On a GPU too the KV cache is never copied: the real compiler says so, for an H200, without one.

`make compile-cuda` installs JAX's CUDA plugin into a folder of its own, which JAX finds only where ``PYTHONPATH`` has
it: a plugin without a GPU beside every other test would be in their way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / ".cuda-compiler"
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
}
GIB = 2**30


@pytest.mark.skipif(not PLUGIN.is_dir(), reason="`make compile-cuda` installs the compiler")
@pytest.mark.parametrize(
    ("model", "limits", "blocks", "most"),
    [("SmolLM2-135M", (8192, 256, 8192), (8000, 80000), GIB), ("Llama-3.1-8B", (8192, 256, 131072), (40000,), GIB)],
)
def test_every_program_writes_in_place(model: str, limits: tuple[int, ...], blocks: tuple[int, ...], most: int):
    """Limits: max_num_batched_tokens, max_num_seqs, max_model_len; most: bytes of a program's temporaries."""
    config = json.dumps({"architectures": ["LlamaForCausalLM"], **MODELS[model]})
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_steps.py")), config, *map(str, (*limits, *blocks))],
        env={
            # without a compile cache: the compiler itself is asked
            **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(PLUGIN)]),
            "JAX_PLATFORMS": "cuda,cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout.splitlines()[-1])
    assert list(compiled) == [str(number) for number in blocks]
    kinds = set()
    for sizes in compiled.values():
        for name, memory in sizes["programs"].items():
            kind = name.split()[0]
            kinds.add(kind)
            # scoring writes to neither
            in_place = 0 if kind == "score" else sizes["tokens"] + (sizes["cache"] if kind == "forward" else 0)
            assert memory["alias"] == in_place, name
            assert memory["temporaries"] < most < sizes["cache"], name
    assert kinds == {"forward", "sample", "score", "write"}
    temporaries = [{name: m["temporaries"] for name, m in sizes["programs"].items()} for sizes in compiled.values()]
    assert all(other == temporaries[0] for other in temporaries), "temporaries grow with the cache"
