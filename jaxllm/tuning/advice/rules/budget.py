"""`max_num_batched_tokens`: too small for the prompts that come, or too large for the time between tokens that is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load
from jaxllm.tuning.advice.step_time import StepTime

SMALL, LARGE = "budget too small", "budget too large"
#: one token of each takes too long, whatever the budget is
MANY = "too many requests"
#: steps that use the budget up, and their share of those with prompts, from which on it is small
FEWEST_STEPS, SHARE = 4, 0.5
#: share of a full step that its fixed part takes, above which more tokens a step make prompts cheaper
FIXED = 0.2
#: of vLLM's guides for throughput
MOST = 16384
#: share of the steps that brought tokens later than was asked for
LATE = 0.01


def advise(load: Load) -> Iterator[Advice]:
    """Larger, as far as that makes prompts cheaper by more than a fifth."""
    budget = load.settings.max_num_batched_tokens
    if budget is None or budget >= MOST:
        return
    if load.steps is None:
        yield from _of_counts(load, budget)
        return
    steps = load.steps
    tokens, prefill = steps["num_prefill_tokens"] + steps["num_decode_tokens"], steps["num_prefill_tokens"] > 0
    full = prefill & (tokens >= budget)
    time = StepTime.of(steps)
    if full.sum() < max(FEWEST_STEPS, SHARE * prefill.sum()) or time is None or not time(budget):
        return
    share = time.fixed / time(budget)
    if share <= FIXED:
        return
    # the longest run of full steps in one replica would have been one step
    burst = max(_longest_run(full[steps["engine"] == number], tokens[steps["engine"] == number])
                for number in np.unique(steps["engine"]))  # fmt: skip
    enough = time.fixed * (1 / FIXED - 1) / time.token if time.token else MOST
    value = _power_of_two(min(burst, enough, MOST))
    if value <= budget:
        return
    yield Advice(
        kind=SMALL,
        evidence=f"{full.sum()} of {prefill.sum()} steps with prompts used up all {budget} tokens, and {share:.0%} of "
        f"such a step's {1e3 * time(budget):.1f} ms does not depend on how many there are",
        numbers={"full_steps": int(full.sum()), "steps": int(prefill.sum()), "fixed_share": share},
        setting=Setting("max_num_batched_tokens", value, "longer steps: tokens of others come later"),
    )


def _of_counts(load: Load, budget: int) -> Iterator[Advice]:
    """Nothing is known of how long steps take; on a CPU that decides everything."""
    if load.settings.platform == "cpu":
        return
    if load.settings.engine == "jaxllm":
        full, steps = load.count("jaxllm:steps_full"), load.count("jaxllm:steps")
    else:
        name = "vllm:iteration_tokens_total"
        found, share = load.histogram(name), load.share_above(name, budget / 2)
        full, steps = (0, 0) if found is None or share is None else (share * found.count, found.count)
    if full < FEWEST_STEPS or full < SHARE * steps:
        return
    yield Advice(
        kind=SMALL,
        evidence=f"{full:.0f} of {steps:.0f} steps used up "
        f"{f'all {budget}' if load.settings.engine == 'jaxllm' else f'more than half of {budget}'} tokens",
        numbers={"full_steps": full, "steps": steps},
        setting=Setting("max_num_batched_tokens", min(2 * budget, MOST), "longer steps: tokens of others come later"),
    )


def advise_for_latency(load: Load, itl: float) -> Iterator[Advice]:
    """Smaller, so that no step with prompts takes longer than the time between two tokens may be; fewer requests, where
    a step without prompts does.

    Args:
        itl: seconds.
    """
    budget = load.settings.max_num_batched_tokens
    if budget is None:
        return
    smaller = Setting("max_num_batched_tokens", max(budget // 2, 64), "prompts take more steps")
    if load.steps is None:
        late = load.share_above("vllm:inter_token_latency_seconds", itl)
        if late is not None and late > LATE and smaller.value < budget:
            evidence = f"{late:.1%} of the tokens came more than {1e3 * itl:g} ms after the one before"
            yield Advice(kind=LARGE, evidence=evidence, numbers={"late_share": late}, setting=smaller)
        return
    time = StepTime.of(load.steps)
    yield from list(_of_prompts(load.steps, itl, time, budget, smaller)) or _of_tokens(load.steps, itl, time)


def _of_prompts(
    steps: Mapping[str, np.ndarray], itl: float, time: StepTime | None, budget: int, smaller: Setting
) -> Iterator[Advice]:
    """Where steps with prompts beside other requests take too long."""
    mixed = (steps["num_prefill_tokens"] > 0) & (steps["num_decode_tokens"] > 0)
    late = mixed & (steps["device_time"] > itl)
    if not late.sum() or late.sum() <= LATE * mixed.sum() or time is None or not time.token:
        return
    decoding = int(steps["num_decode_tokens"].max())
    value = int((itl - time.fixed) / time.token)
    value = value // 8 * 8 if value > 8 else value
    evidence = (
        f"{late.sum()} of {mixed.sum()} steps with prompts beside other requests took longer than {1e3 * itl:g} ms, up "
        f"to {1e3 * steps['device_time'][late].max():.1f} ms; a step takes {1e3 * time.fixed:.1f} ms and "
        f"{1e6 * time.token:.0f} us a token"
    )
    numbers = {"late_steps": int(late.sum()), "steps": int(mixed.sum()), "fixed": time.fixed, "token": time.token}
    if value > decoding and value < budget:
        yield Advice(kind=LARGE, evidence=evidence, numbers=numbers, setting=smaller._replace(value=value))
    elif decoding > 1 and 0 < value <= decoding:
        setting = Setting("max_num_seqs", max(value - 1, 1), f"a token for each of {decoding} takes as long as that")
        yield Advice(kind=MANY, evidence=evidence, numbers=numbers, setting=setting)


def _of_tokens(steps: Mapping[str, np.ndarray], itl: float, time: StepTime | None) -> Iterator[Advice]:
    """Where steps without prompts take too long; nothing, where one of a single token does."""
    plain = (steps["num_prefill_tokens"] == 0) & (steps["num_drafted_tokens"] == 0) & (steps["num_seqs"] > 1)
    late = plain & (steps["device_time"] > itl * steps["num_steps"])
    if late.sum() <= LATE * plain.sum() or (time is not None and time(1) >= itl):
        return
    most, value = int(steps["num_seqs"][late].max()), 0
    if time is not None and time.token:
        value = int((itl - time.fixed) / time.token)
    yield Advice(
        kind=MANY,
        evidence=f"{late.sum()} of {plain.sum()} steps without prompts took longer than {1e3 * itl:g} ms, with up to "
        f"{most} requests",
        numbers={"late_steps": int(late.sum()), "steps": int(plain.sum())},
        setting=Setting("max_num_seqs", value if 0 < value < most else max(most // 2, 1), "fewer requests at once"),
    )


def _longest_run(full: np.ndarray, tokens: np.ndarray) -> int:
    most = run = 0
    for is_full, count in zip(full.tolist(), tokens.tolist(), strict=True):
        run = run + count if is_full else 0
        most = max(most, run)
    return most


def _power_of_two(number: float) -> int:
    return 1 << max(int(number) - 1, 1).bit_length()
