"""`jaxllm warm` fills the compile cache ahead of starts, and starts with other limits find what it made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.test_compiles import COMPILED, LOWERED, counted_events

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.cli import main

OPTIONS = "--dtype float32 --max-model-len 256 --max-num-seqs 4 --max-num-batched-tokens 32".split()
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
}
PROMPTS = [
    {"prompt_token_ids": np.random.default_rng(length).integers(256, size=length).tolist()} for length in (5, 70)
]


@pytest.fixture(scope="module")
def warmed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the programs of `ARGUMENTS`, made by the command."""
    folder = tmp_path_factory.mktemp("cache")
    # in a process of its own: what JAX's own cache gave to another test's engine has no machine code to keep, and JAX
    # would give it again
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "jaxllm", "warm", str(tiny_model), *OPTIONS]
    environment |= {"JAXLLM_CACHE": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"^(\d+) of (\d+) programs compiled", done.stdout, re.MULTILINE)
    assert found is not None and found[1] == found[2] and int(found[1]) >= 8
    return folder


def test_what_is_there_is_left_and_told(
    warmed: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("JAXLLM_CACHE", str(warmed))
    with counted_events() as events:
        assert main(["warm", str(tiny_model), *OPTIONS, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["warm", "--model", str(tiny_model), *OPTIONS]) == 0
    assert not events[LOWERED] and not events[COMPILED]
    files = {path.stat().st_size for path in warmed.glob("xla/*/*.program")}
    assert found["num_compiled"] == 0 and {program["num_bytes"] for program in found["programs"]} == files
    names = [program["name"] for program in found["programs"]]
    assert {"forward, 8 tokens x 8 seqs", "forward, 32 tokens x 8 seqs", "score"} <= set(names)
    text = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} +\d+\.\d\d MB  was there$", text, re.MULTILINE) for name in names)
    assert f"0 of {len(names)} programs compiled" in text and str(warmed) in text


@pytest.fixture(scope="module")
def expected(warmed: Path, tiny_model: Path) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_CACHE", str(warmed))
        with counted_events() as events, LLM(tiny_model, **ARGUMENTS) as llm:
            tokens = generated(llm)
    assert not events[LOWERED] and not events[COMPILED]
    return tokens


def generated(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"max_model_len": 100},
        {"max_num_seqs": 7, "max_model_len": 512},
        {"max_num_seqs": 1, "max_model_len": 80, "enforce_eager": True},
    ],
    ids=["the same", "a shorter context", "more and longer requests", "fewer programs"],
)
def test_a_start_with_other_limits_traces_nothing_and_holds_them(
    warmed: Path,
    tiny_model: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, Any],
):
    monkeypatch.setenv("JAXLLM_CACHE", str(warmed))
    arguments = {**ARGUMENTS, **other}
    with counted_events() as events, LLM(tiny_model, **arguments) as llm:
        assert generated(llm) == expected
        longest = arguments["max_model_len"]
        to_the_end = llm.generate(PROMPTS[1], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
        assert len(PROMPTS[1]["prompt_token_ids"]) + len(to_the_end.outputs[0].token_ids) == longest
        with pytest.raises(ValidationError, match=f"{longest}"):
            llm.generate({"prompt_token_ids": [1] * (longest + 1)}, use_tqdm=False)
    assert not events[LOWERED] and not events[COMPILED]


def test_what_would_not_be_kept_is_an_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["warm", str(tiny_model), "--load-format", "null"]) == 1
    assert "nothing to compile" in capsys.readouterr().err
    assert main(["warm", str(tiny_model), *OPTIONS, "--runner", "pooling", "--convert", "classify"]) == 1
    assert "needs a classifier" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["warm", str(tiny_model), *OPTIONS]) == 1
    assert "JAXLLM_CACHE" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the pool's memory is taken at once")
def test_pools_of_other_sizes_find_the_programs_of_earlier_ones(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Arrays that take memory as they are written have more blocks than the pool hands out."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    # blocks of 8 KB
    arguments: dict[str, Any] = {**ARGUMENTS, "block_size": 16, "enforce_eager": True}
    with LLM(tiny_model, **arguments, num_gpu_blocks_override=25) as llm:
        first = generated(llm)
    with counted_events() as events, LLM(tiny_model, **arguments, kv_cache_memory_bytes=49 * 8192) as llm:
        assert generated(llm) == first
        assert llm.memory_plan.num_blocks == 49 and llm.memory_plan.kv_cache_bytes == 49 * 8192
    assert not events[LOWERED] and not events[COMPILED]
