"""Advice from how an engine fared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.trace import Trace
from jaxllm.tuning.advice.advice import Advice, AdviceList
from jaxllm.tuning.advice.load import Load
from jaxllm.tuning.advice.rules import (
    budget,
    drafts,
    encoder,
    host,
    padding,
    preemptions,
    prefix_cache,
    rows,
    tokenizer,
)

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

#: what hurts most comes first
RULES: tuple[Callable[[Load], Iterator[Advice]], ...] = (
    preemptions.advise,
    rows.advise,
    budget.advise,
    prefix_cache.advise,
    drafts.advise,
    encoder.advise,
    tokenizer.advise,
    padding.advise,
    host.advise,
)


def advise(load: Load, *, itl: float | None = None) -> AdviceList:
    """What would have helped.

    Args:
        itl: seconds that may lie between two tokens of a request; None: any number.

    Raises:
        ValidationError: `itl` is not above 0.
    """
    if itl is not None and not (isinstance(itl, int | float) and itl > 0):
        raise ValidationError(f"itl must be a number of seconds greater than 0, such as 0.05; got {itl!r}.")
    found = [advice for rule in RULES for advice in rule(load)]
    if itl is not None:
        # more tokens a step would make it worse
        found = [advice for advice in found if advice.kind != budget.SMALL]
        found += budget.advise_for_latency(load, itl)
    return AdviceList(found)


def load_of_trace(trace: Trace) -> Load:
    """Raises ValidationError for one that runs, that no engine has made, or that is none."""
    if not isinstance(trace, Trace):
        raise ValidationError(f"trace must be a Trace, of llm.trace(), got {trace!r:.80}.")
    if trace.settings is None or not trace.metrics:
        raise ValidationError("the trace has no settings and metrics of an engine: stop it first, or take llm.trace().")
    return Load(
        settings=trace.settings,
        metrics=tuple(trace.metrics),
        steps=trace.arrays() if trace.steps else None,
        lengths=tuple((request.num_prompt_tokens, request.num_output_tokens) for request in trace.requests),
    )


def load_of_engine(engine: Engine) -> Load:
    """What its counters have counted since its start."""
    return Load(settings=engine.watching.settings, metrics=tuple(engine.core.metrics()))


def advise_engine(engine: Engine, trace: Trace | None = None, *, itl: float | None = None) -> AdviceList:
    """As `LLM.advise`, whatever is the engine's face."""
    return advise(load_of_engine(engine) if trace is None else load_of_trace(trace), itl=itl)
