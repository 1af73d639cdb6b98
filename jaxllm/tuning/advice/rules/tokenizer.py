"""The engine waited for prompts to be tokenized."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load

KIND = "tokenizer"
#: seconds, their share of the engine's time, and steps: from which on it is worth a word
FEWEST_SECONDS, SHARE, FEWEST_STEPS = 0.05, 0.1, 8


def advise(load: Load) -> Iterator[Advice]:
    """More threads, no more than there are processors."""
    pool, processors = load.settings.tokenizer_pool_size, load.settings.num_processors
    if pool is None or processors is None or pool >= processors:
        return
    waited, steps = load.count("jaxllm:tokenizer_wait_seconds"), load.count("jaxllm:steps")
    starved = load.count("jaxllm:steps_starved")
    seconds = waited + load.count("jaxllm:host_seconds") + load.count("jaxllm:device_wait_seconds")
    if waited < max(FEWEST_SECONDS, SHARE * seconds) and starved < max(FEWEST_STEPS, SHARE * steps):
        return
    yield Advice(
        kind=KIND,
        evidence=f"nothing ran in {waited:.2f} of {seconds:.2f} s, and {starved:.0f} of {steps:.0f} steps had free "
        f"rows, while prompts were being tokenized by {pool or 'no'} thread{'' if pool == 1 else 's'}",
        numbers={"tokenizer_wait_seconds": waited, "seconds": seconds, "steps_starved": starved, "steps": steps},
        setting=Setting("tokenizer_pool_size", min(max(2 * pool, 1), processors)),
    )
