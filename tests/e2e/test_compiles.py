"""No compile after the start, and none at a second start: by JAX's own events, which know nothing of our programs."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np

from jaxllm import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 32,
    "block_size": 16,
    "num_gpu_blocks_override": 16,
}


@contextlib.contextmanager
def counted_events() -> Iterator[collections.Counter[str]]:
    """How often JAX traced, lowered or compiled something inside, by the event's name."""
    counts: collections.Counter[str] = collections.Counter()

    def count(event: str, *_: Any, **__: Any) -> None:
        if "compil" in event:
            counts[event] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(count)


def make_params(rng: random.Random) -> SamplingParams:
    """Every sampling feature, each for itself and in combinations."""

    def maybe(value: Any, otherwise: Any = None) -> Any:
        return value if rng.random() < 0.25 else otherwise

    some_ids = rng.sample(range(256), 30)
    reports: dict[str, Any] = rng.choice(
        ({}, {}, {"logprobs": 0}, {"logprobs": 20}, {"logprob_token_ids": some_ids[:9]})
    )
    return SamplingParams(
        temperature=rng.choice((0.0, 0.0, 0.5, 1.0, 2.0)),
        top_k=maybe(rng.choice((1, 5, 200)), 0),
        top_p=maybe(rng.choice((0.1, 0.9)), 1.0),
        min_p=maybe(0.05, 0.0),
        seed=maybe(rng.randrange(2**63)),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.7, 0.0),
        frequency_penalty=maybe(-0.4, 0.0),
        logit_bias=maybe({token: rng.uniform(-5, 5) for token in some_ids[:7]}),
        allowed_token_ids=maybe(some_ids),
        bad_words=maybe(["a", "the", "xy"]),
        min_tokens=maybe(3, 0),
        stop_token_ids=maybe(some_ids[:5]),
        stop=maybe(["e", "zz"]),
        **reports,
        prompt_logprobs=maybe(rng.choice((0, 3))),
        flat_logprobs=maybe(True, False),
        skip_reading_prefix_cache=maybe(True),
        max_tokens=rng.randint(3, 20),
    )


def make_prompts(rng: random.Random, count: int) -> list[list[int]]:
    beginnings = [[rng.randrange(256) for _ in range(length)] for length in (17, 33, 80)]
    prompts = []
    for _ in range(count):
        beginning = rng.choice(beginnings) if rng.random() < 0.4 else []
        prompts.append(beginning + [rng.randrange(256) for _ in range(rng.choice((1, 2, 9, 40, 60)))])
    return prompts


def test_200_requests_compile_nothing(tiny_model: Path):
    rng = random.Random(200)
    prompts = make_prompts(rng, 200)
    params = [make_params(rng) for _ in prompts]
    with LLM(tiny_model, **ARGUMENTS, kv_offloading_size="2MB") as llm:
        with counted_events() as events:
            core = llm.engine.core
            # alone, with others, aborted in every state, and a stream beside them
            llm.generate(prompts[0], params[0], use_tqdm=False)
            llm.generate(prompts[1:90], params[1:90], use_tqdm=False)
            for i in range(90, 150):
                core.add_request(*llm.engine.inputs.request(f"abort-{i}", prompts[i], params[i]))
            for i in range(90, 150):
                core.step()
                core.abort([f"abort-{i}"])
            core.drain()
            stream = llm.stream_chat([{"role": "user", "content": "hello"}], params[150])
            next(stream, None)
            llm.reset_prefix_cache()
            llm.generate(prompts[151:], params[151:], use_tqdm=False)
            list(stream)
            metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert not events
        assert metrics["vllm:prefix_cache_hits"] > 0
        assert metrics["vllm:external_prefix_cache_hits"] > 0
        assert metrics["vllm:num_preemptions"] > 0, "the pool is small enough to preempt"


def test_the_events_tell_of_a_compile():
    with counted_events() as events:
        jax.jit(lambda x: x * 2 + 1)(np.zeros(1237, np.float32)).block_until_ready()
    assert events["/jax/core/compile/backend_compile_duration"] == 1
    with counted_events() as events:
        jax.device_put(np.zeros(1237, np.float32)).block_until_ready()
    assert not events


START = """
import collections, json, sys
import jax.monitoring

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event]))
from jaxllm import LLM, SamplingParams

with LLM(sys.argv[1], skip_tokenizer_init=True, **json.loads(sys.argv[2])) as llm:
    params = [SamplingParams(temperature=0), SamplingParams(seed=1, top_p=0.9, presence_penalty=1.0, logprobs=2)]
    outputs = llm.generate([[1, 2, 3], [5] * 70], params, use_tqdm=False)
print(json.dumps([[output.outputs[0].token_ids for output in outputs], events]))
"""
COMPILED, LOWERED = "/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"


def starts(model: Path, cache: Path, count: int) -> list[tuple[list[list[int]], dict[str, int], str]]:
    """So many processes that start at once: what each generates, JAX's events in it, and its log."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        "JAXLLM_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    arguments = json.dumps({**ARGUMENTS, "dtype": "bfloat16", "enforce_eager": True})
    command = [sys.executable, "-c", START, str(model), arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = []
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(command, env=environment, **pipes)) for _ in range(count)]
        for process in started:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            tokens, events = json.loads(out.splitlines()[-1])
            found.append((tokens, collections.Counter(events), errors))
    return found


def test_a_second_process_compiles_nothing(tiny_model: Path, tmp_path: Path):
    """The first two, at once, fill the cache together."""
    both = starts(tiny_model, tmp_path, 2)
    for tokens, events, log in both:
        assert re.search(r"Compiling \d+ of 6 programs, and keeping them for the next start\n", log), log
        assert tokens == both[0][0]
        assert events[LOWERED] >= 4, "forward, sampling, allocation, rows of known tokens"
    assert all(path.suffix in (".name", ".program", ".json") for path in tmp_path.glob("xla/*/*"))
    ((tokens, events, log),) = starts(tiny_model, tmp_path, 1)
    assert "Loading 6 programs from the compile cache\n" in log
    assert tokens == both[0][0]
    assert not events[LOWERED]
    assert not events[COMPILED]
