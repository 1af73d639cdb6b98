"""How a program ends that has an engine: cleanly, whatever ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASYNC = """
import asyncio, sys
from support.tiny_model import SMALL
from jaxllm import AsyncLLM, SamplingParams, TokensPrompt

async def main():
    engine = AsyncLLM(sys.argv[1], skip_tokenizer_init=True, **SMALL)
    # the engine's thread has something to do until the end
    engine.llm.enqueue([[1]] * 50, SamplingParams(max_tokens=200, ignore_eos=True))
    async for output in engine.generate(TokensPrompt(prompt_token_ids=[1, 2])):
        raise ValueError("the user's own")

asyncio.run(main())
"""
THREAD = """
import sys, threading
from support.tiny_model import SMALL
from jaxllm import LLM, SamplingParams

llm = LLM(sys.argv[1], **SMALL)
begun = threading.Event()

def generate():
    for _ in llm.stream("go on", SamplingParams(max_tokens=200, ignore_eos=True)):
        begun.set()

threading.Thread(target=generate, daemon=True).start()
begun.wait()
raise ValueError("the user's own")
"""


def ends(program: str, model: Path) -> tuple[int, str]:
    """Exit status and standard error of a Python program that runs `model`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_a_program_that_leaves_an_async_engine_running(tiny_model: Path):
    found, errors = ends(ASYNC, tiny_model)
    assert found == 1, errors
    assert "a step of the engine failed" not in errors
    assert errors.rstrip().endswith("ValueError: the user's own"), errors


@pytest.mark.thorough
def test_a_program_that_ends_while_a_thread_of_its_own_generates(tiny_model: Path):
    found, errors = ends(THREAD, tiny_model)
    assert found == 1, errors
    assert errors.rstrip().endswith("ValueError: the user's own"), errors


AFTER_MAIN = """
import sys, threading
from jaxllm import LLM, SamplingParams

llm = LLM(sys.argv[1], load_format="null", skip_tokenizer_init=True)

def generate():
    threading.main_thread().join()
    print(len(llm.generate([[1]] * 300, SamplingParams(max_tokens=2), use_tqdm=False)))

threading.Thread(target=generate).start()
"""


def test_a_thread_goes_on_after_the_main_thread_has_ended(tiny_model: Path):
    found, errors = ends(AFTER_MAIN, tiny_model)
    assert found == 0, errors


STARTING = """
import sys, threading
import jax, jax.numpy as jnp
import jaxllm.startup.start as startup
from jaxllm import LLM

begun = threading.Event()
null_runner, product = startup.null_runner, jax.jit(lambda x: x @ x / 300)

def in_xla(*args, **kwargs):
    x = product(jnp.ones((300, 300)))
    begun.set()
    for _ in range(300):
        x = product(x).block_until_ready()
    return null_runner(*args, **kwargs)

startup.null_runner = in_xla
threading.Thread(target=lambda: LLM(sys.argv[1], load_format="null", skip_tokenizer_init=True), daemon=True).start()
begun.wait()
raise ValueError("the user's own")
"""


def test_a_program_that_ends_while_a_thread_of_its_own_starts_an_engine(tiny_model: Path):
    found, errors = ends(STARTING, tiny_model)
    assert found == 1, errors
    assert "ValueError: the user's own" in errors
