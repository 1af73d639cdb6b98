"""Requests waited for a row while most of the KV cache was empty."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.engine.observe.step_counts import HALF
from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load

KIND = "queue"
#: steps, and their share of all, from which on it is worth a word
FEWEST_STEPS, SHARE = 8, 0.1
#: of the KV cache, what more requests may fill
FILL = 0.9


def advise(load: Load) -> Iterator[Advice]:
    """Enough rows for all that were there, as far as the KV cache holds them."""
    if load.settings.engine == "vllm":
        yield from _of_gauges(load)
        return
    rows, steps = load.rows, int(load.count("jaxllm:steps"))
    waited = int(load.count("jaxllm:steps_without_row"))
    if rows is None or waited < max(FEWEST_STEPS, SHARE * steps):
        return
    peak = int(load.gauge("jaxllm:most_requests"))
    value = min(-(-peak // 8) * 8, load.room(FILL))
    value = min(value, load.settings.max_num_batched_tokens or value)
    if value <= rows:
        return
    argument = "max_num_active_seqs" if load.settings.max_num_active_seqs else "max_num_seqs"
    yield Advice(
        kind=KIND,
        evidence=f"in {waited} of {steps} steps requests waited for one of {rows} rows, up to {peak - rows} of them, "
        f"while less than {HALF:.0%} of the KV cache was in use",
        numbers={"steps": steps, "steps_without_row": waited, "most_requests": peak},
        setting=Setting(argument, value),
    )


def _of_gauges(load: Load) -> Iterator[Advice]:
    """vLLM says how it is at the moment, and not how many rows there are: as many as run, while others wait."""
    if load.count("vllm:num_preemptions"):  # more of them would be put back
        return
    running, waiting = (load.gauges(f"vllm:num_requests_{what}") for what in ("running", "waiting"))
    usage = load.gauges("vllm:kv_cache_usage_perc")
    # of several engines, that in which most wait
    for engine in sorted(running.keys() & waiting.keys() & usage.keys(), key=lambda each: -waiting[each]):
        runs, waits, used = running[engine], waiting[engine], usage[engine]
        if not (runs and waits and 0 < used < HALF) or runs < (load.rows or 0):
            continue
        where = f" in engine {engine}" if len(usage) > 1 else ""
        yield Advice(
            kind=KIND,
            evidence=f"{waits:.0f} requests wait while {runs:.0f} run{where}, and {used:.0%} of the KV cache is in use",
            numbers={"running": runs, "waiting": waits, "usage": used},
            setting=Setting("max_num_seqs", int(min(runs + waits, runs * FILL / used))),
        )
        return
