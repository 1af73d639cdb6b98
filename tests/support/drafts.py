"""Engines with drafts beside an engine without any, asked for the same."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm import LLM
from jaxllm.api.outputs import RequestOutput
from jaxllm.speculative.adaptive import ONE


@contextlib.contextmanager
def checks_that_cost(llm: LLM, steps: float) -> Iterator[None]:
    """Every draft adds so much to a step, as the rule has it, and it stays so."""
    head: Any = llm.engine.core.cores[0]._runner.head  # pyright: ignore
    programs, learns, head._learns = head.programs, head._learns, False
    before = {seqs: costs.copy() for seqs, costs in programs.check_costs.items()}
    for costs in programs.check_costs.values():
        costs[:] = np.asarray(programs.adaptive.lengths) * steps * ONE
    yield
    for seqs, costs in programs.check_costs.items():
        costs[:] = before[seqs]
    head._learns = learns


def counted(llm: LLM, name: str) -> Any:
    (metric,) = (metric for metric in llm.get_metrics() if metric.name == f"vllm:spec_decode_{name}")
    return getattr(metric, "values", None) or getattr(metric, "value", 0)


def generated(llm: LLM) -> int:
    """Tokens since the engine's start, as the metrics have them."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:generation_tokens")  # pyright: ignore


def results(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    completions = [one for output in outputs for one in output.outputs]
    return [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in completions]


def repeating(seed: int, length: int) -> list[int]:
    """Runs that come again, of a few tokens each."""
    rng = random.Random(seed)
    runs = [[rng.randrange(256) for _ in range(rng.randrange(2, 6))] for _ in range(3)]
    ids: list[int] = []
    while len(ids) < length:
        ids += rng.choice(runs)
    return ids[:length]


def compare(plain: LLM, drafting: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    for llm in (plain, drafting):
        llm.reset_prefix_cache()
    wanted = plain.generate(prompts, params, use_tqdm=False)
    got = drafting.generate(prompts, params, use_tqdm=False)
    assert results(got) == results(wanted)
    assert drafting.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
    return got
