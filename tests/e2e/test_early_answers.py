"""An engine answers before all of its programs are there, and no step waits for one."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from e2e.test_compiles import LOWERED, counted_events

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import JaxLLMError
from jaxllm.config.engine_args import engine_args
from jaxllm.runner.build import make_programs
from jaxllm.runner.compile.programs import Key, Programs
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.target import target_here
from jaxllm.runner.heads.sampling_programs import WRITER, SamplingPrograms
from jaxllm.startup.setup import read_setup
from jaxllm.tuning.simulation.measure import run_steps

#: programs for steps of 1, 8, 16, 32, 64 and 128 tokens, samplers for 8 and 32 rows, and too few blocks for all prompts
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 128,
    "block_size": 16,
    "num_gpu_blocks_override": 24,
}
RNG = np.random.default_rng(28)
PROMPTS = [{"prompt_token_ids": RNG.integers(256, size=length).tolist()} for length in (3, 5, 40, 150, 9, 30, 60, 2)]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, logprobs=5, prompt_logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=12, presence_penalty=1.0, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=12, logit_bias={7: 50.0}, bad_words=["a"]),
    LONG,
    SamplingParams(temperature=0, max_tokens=20, structured_outputs={"regex": "[ab]{3,9}"}),
    LONG,
    LONG,
    LONG,
]
BEGINS_EARLY, COMPILE_LATE = SamplingPrograms._begins_early, Programs.compile_late


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines do not wait for all programs, and none was kept."""
    monkeypatch.setattr(SamplingPrograms, "_begins_early", BEGINS_EARLY)
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))


@pytest.fixture
def gate(early: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no late program is made."""
    open_gate = threading.Event()

    def compile_late(self: Programs, key: Key, beside: Any) -> None:
        assert open_gate.wait(60)
        COMPILE_LATE(self, key, beside)

    monkeypatch.setattr(Programs, "compile_late", compile_late)
    yield open_gate
    open_gate.set()


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def sizes(llm: LLM) -> list[int]:
    return [bucket.tokens for bucket in llm.engine.runners[0].head.programs.buckets]  # pyright: ignore


def test_tokens_are_the_same_whatever_programs_are_there(
    tiny_model: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "jaxllm")
    with LLM(tiny_model, **ARGUMENTS) as llm:
        assert sizes(llm) == [32, 128]
        with counted_events() as events:
            first = answers(llm)
        assert not events, "no step compiles"
        metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"] > 0
        gate.set()
        llm.reset_prefix_cache()
        with counted_events() as events:
            assert answers(llm) == first, "while programs come"
            llm.wait_until_ready()
        assert events[LOWERED] >= 6
        assert sizes(llm) == [1, 8, 16, 32, 64, 128]
        llm.reset_prefix_cache()
        with counted_events() as events:
            assert answers(llm) == first
        assert not events
    assert "Compiling 6 of 6 programs" in caplog.text and "6 more programs are there" in caplog.text
    caplog.clear()
    with counted_events() as events, LLM(tiny_model, **ARGUMENTS) as llm:
        assert sizes(llm) == [1, 8, 16, 32, 64, 128], "what was kept is there at once"
        llm.wait_until_ready()
    assert not events[LOWERED] and "Loading 11 programs" in caplog.text


def test_a_program_that_fails_is_told_and_done_without(
    tiny_model: Path, early: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def compile_late(self: Programs, key: Key, beside: Any) -> None:
        if key[0] == "sample" or key[1].tokens != 8:
            raise RuntimeError("no memory left")
        COMPILE_LATE(self, key, beside)

    monkeypatch.setattr(Programs, "compile_late", compile_late)
    with LLM(tiny_model, **ARGUMENTS) as llm:
        with pytest.raises(JaxLLMError, match="5 programs were not compiled.* 1 tokens x 1 seqs: no memory left"):
            llm.wait_until_ready()
        assert sizes(llm) == [8, 32, 128]
        assert len(answers(llm)) == len(PROMPTS)
    assert caplog.text.count("no memory left") == 5


def test_an_engine_ends_while_programs_are_late(tiny_model: Path, gate: threading.Event):
    llm = LLM(tiny_model, **ARGUMENTS)
    engine = llm.engine
    llm.sleep(level=1)
    llm.wake_up()
    llm.shutdown()
    gate.set()
    with pytest.raises(JaxLLMError, match="was shut down before"):
        engine.wait_until_ready()


@pytest.mark.thorough
def test_steps_are_timed_in_programs_that_they_will_run_in(tiny_model: Path, gate: threading.Event):
    with LLM(tiny_model, **{**ARGUMENTS, "max_num_seqs": 8, "max_num_batched_tokens": 8}) as llm:
        assert sizes(llm) == [8]
        threading.Timer(0.1, gate.set).start()
        steps = run_steps(llm, rounds=1, most_requests=1).arrays()
    single = steps["num_prefill_tokens"] + steps["num_decode_tokens"] == 1
    assert single.sum() > 4 and set(steps["bucket_tokens"][single]) == {1}


def boosted(logits: jax.Array, state: Any) -> jax.Array:
    return logits


def programs(model: Path, **arguments: Any) -> Any:
    """Of an engine with these arguments, none of them compiled."""
    setup = read_setup(engine_args(model, **ARGUMENTS, **arguments), model)
    config = dataclasses.replace(
        setup.runner_config(target_here("cpu"), progress=StartProgress(quiet=True)), answers_early=True
    )
    return make_programs(config, config.params(), 24)


def test_code_of_the_user_and_contexts_of_jax_are_not_traced_later(tiny_model: Path, early: None):
    assert len(programs(tiny_model)._replaceable()) == 6
    assert len(programs(tiny_model, deterministic=True)._replaceable()) == 5, "samplers may differ in the last digits"
    assert not programs(tiny_model, logits_processors=[boosted])._replaceable()
    with jax.default_matmul_precision("highest"):
        assert not programs(tiny_model)._replaceable()


def test_no_program_is_made_under_other_settings_of_jax(tiny_model: Path, early: None):
    made, before = programs(tiny_model), jax.config.values["jax_enable_x64"]
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(JaxLLMError, match="jax_enable_x64 of jax.config changed after the engine had started"):
            made.compile_late(WRITER, lambda program: program)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert not made._store.has(WRITER)
    made.compile_late(WRITER, lambda program: program)
    assert made._store.has(WRITER)


EXIT = """
import sys
from jaxllm import LLM

llm = LLM(sys.argv[1], dtype="float32", max_num_batched_tokens=512, skip_tokenizer_init=True)
assert llm.engine.runners[0].head.programs.late
"""


@pytest.mark.thorough
def test_the_interpreter_ends_while_programs_are_late(tiny_model: Path, tmp_path: Path):
    environment = os.environ | {"JAXLLM_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tiny_model)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
