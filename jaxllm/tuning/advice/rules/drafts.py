"""Drafts cost more than they bring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load
from jaxllm.tuning.advice.step_time import StepTime

KIND = "speculation"
#: launches with drafts whose times say something
FEWEST_STEPS = 4
#: drafts that say something, and how often one at its place has to be right to be worth its check
FEWEST_DRAFTS, RIGHT = 32, 0.1


def advise(load: Load) -> Iterator[Advice]:
    """None where steps without drafts would have been faster; else no more than are right now and then."""
    most, places = load.settings.num_speculative_tokens, load.values("vllm:spec_decode_num_accepted_tokens_per_pos")
    checks, drafted, accepted = (
        load.count(f"vllm:spec_decode_num_{what}") for what in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if checks < FEWEST_DRAFTS:
        return
    seen = f"{accepted:.0f} of {drafted:.0f} drafts were right, {1 + accepted / checks:.2f} tokens a check"
    numbers = {"checks": checks, "drafted": drafted, "accepted": accepted}
    compared = _seconds(load)
    if compared is not None and compared[0] > compared[1]:
        drafting, plain = compared
        yield Advice(
            kind=KIND,
            evidence=f"{seen}; steps with drafts took {drafting:.3f} s, and others would have brought the same tokens "
            f"in {plain:.3f} s",
            numbers=numbers | {"seconds_with": drafting, "seconds_without": plain},
            setting=Setting("speculative_config", None),
        )
        return
    rates = _rates(places[: most or None], checks, drafted)
    useful = sum(1 for _ in itertools.takewhile(lambda rate: rate >= RIGHT, rates))
    if not rates or useful == len(rates):
        return
    setting = Setting("speculative_config", None)
    if useful:
        setting = Setting("num_speculative_tokens", useful, "of speculative_config")
    yield Advice(
        kind=KIND,
        evidence=f"{seen}; those at place {useful + 1} in at most {rates[useful]:.1%} of their checks",
        numbers=numbers | {"right_at_place": rates[useful]},
        setting=setting,
    )


def _rates(places: Sequence[float], checks: float, drafted: float) -> list[float]:
    """How often, at most, a draft at each place was right.

    How many checks had a draft there is not counted. Every check has one at the first place, and at most as many have
    one at a place as at the one before: so where checks have all of their drafts, all have one, and where they are
    short there may be none, which says nothing against it.
    """
    fewest = [checks, *((drafted - place * checks) / (len(places) - place) for place in range(1, len(places)))]
    return [min(right / count, 1.0) if count > 0 else 1.0 for right, count in zip(places, fewest, strict=False)]


def _seconds(load: Load) -> tuple[float, float] | None:
    """Of launches with drafts, and what steps without any would have taken for the same tokens; None: too few of one.

    A step without drafts brings each of its requests a token.
    """
    time = None if load.steps is None else StepTime.of(load.steps)
    if load.steps is None or time is None:
        return None
    steps = load.steps
    drafting = steps["num_drafted_tokens"] > 0
    if drafting.sum() < FEWEST_STEPS:
        return None
    requests = steps["num_seqs"][drafting]
    each = steps["num_decode_tokens"][drafting] / requests
    plain = float((each * (time.fixed + time.token * requests)).sum())
    return float(steps["device_time"][drafting].sum()), plain
