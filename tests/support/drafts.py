"""Engines that draft, whatever it costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm import LLM
from jaxllm.speculative.adaptive import ONE


@contextlib.contextmanager
def checks_that_cost(llm: LLM, steps: float) -> Iterator[None]:
    """Every draft adds so much to a step, as the rule has it."""
    programs: Any = llm.engine.core.cores[0]._runner.head.programs  # pyright: ignore
    before = {seqs: costs.copy() for seqs, costs in programs.check_costs.items()}
    for costs in programs.check_costs.values():
        costs[:] = np.asarray(programs.adaptive.lengths) * steps * ONE
    yield
    for seqs, costs in programs.check_costs.items():
        costs[:] = before[seqs]
