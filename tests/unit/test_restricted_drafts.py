"""When launches have drafts of requests that the host restricts, or beside prompts, and what that may cost."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.structured.drafts import CheckedDrafts, HostDraftRule, HostDrafts

DRAFTS = 3


class Anything:
    """Restricts its request from some number of tokens on, and leaves no choice where it is told so."""

    grammar = None
    is_complete = False

    def __init__(self, forced: list[int], horizon: int = 0) -> None:
        self.next, self._horizon = forced, horizon

    def may_constrain(self, num_unread: int) -> bool:
        return num_unread >= self._horizon

    def fill_mask(self, out: np.ndarray) -> str | None:
        return None

    def advance(self, token_id: int) -> str | None:
        self.next = self.next[1:]
        return None

    def forced(self) -> list[int]:
        return self.next

    def copy(self) -> Anything:
        return Anything(list(self.next), self._horizon)


def engine() -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=4096,
        num_drafts=DRAFTS,
        max_draft_seqs=4,
        num_decode_steps=8,
        num_draft_steps=2,
    )
    return Scheduler(config, CacheConfig(num_blocks=4000, block_size=4, groups=(KVCacheGroup(layers=(0,)),)))


def add(scheduler: Scheduler, name: str, matcher: Anything | None) -> Request:
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    new = Request(name, list(range(100 * len(name), 100 * len(name) + 5)), params)
    scheduler.add_request(new)
    new.matcher = matcher
    if matcher is not None:
        new.host_drafts = HostDrafts(HostDraftRule(DRAFTS, 1, 2))
    return new


def read(scheduler: Scheduler, step: SchedulerOutput, right: int) -> None:
    """With drafts, so many of which are right; every token is another one. Chunks of prompts bring none."""
    counts = [1 + min(right, step.num_drafts) if wanted else 0 for wanted in step.wanted]
    made = iter(range(1000 + 10 * step.step, 10**6))
    output = StepOutput(token_ids=[next(made) for _ in range(sum(counts))], counts=counts)
    if step.num_drafts:
        output.drafted = np.full((len(step.rows), 1), step.num_drafts)
        output.accepted = np.full((len(step.rows), 1), right)
        for row, request in zip(step.rows, step.requests, strict=True):
            if request.matcher is not None:
                step.checked[row] = CheckedDrafts([], np.zeros((1, 1), np.int32))
    scheduler.update(step, output)


def test_a_launch_with_the_hosts_drafts_begins_when_all_is_read():
    scheduler = engine()
    matcher = Anything([])
    add(scheduler, "a", matcher)
    prompt, first = scheduler.schedule(), scheduler.schedule()
    # nothing is forced, and no run comes again
    assert (first.num_drafts, first.counts) == (0, [1])
    read(scheduler, prompt, 0)
    second = scheduler.schedule()
    assert (second.num_drafts, second.counts) == (0, [1])
    # two tokens are not read, and one behind them is foreseen
    matcher.next = [7, 8, 9]
    assert scheduler.schedule().rows == []
    read(scheduler, first, 0)
    read(scheduler, second, 0)
    third = scheduler.schedule()
    assert (third.num_steps, third.num_drafts, third.counts, third.resumes) == (1, DRAFTS, [1 + DRAFTS], [False])
    assert scheduler.schedule().rows == []
    read(scheduler, third, 2)
    # as many tokens were read as came
    assert scheduler.schedule().starts == [5 + 5]


def test_what_is_beside_has_drafts():
    scheduler = engine()
    add(scheduler, "a", Anything([]))
    add(scheduler, "bb", None)
    read(scheduler, scheduler.schedule(), 0)
    step = scheduler.schedule()
    assert (step.num_steps, step.num_drafts, step.counts) == (1, DRAFTS, [1 + DRAFTS] * 2)
    assert scheduler.schedule().rows == []


def test_a_budget_that_is_far_away_restricts_nothing():
    scheduler = engine()
    add(scheduler, "a", Anything([], horizon=100))
    step = scheduler.schedule()
    found = []
    for _ in range(6):
        following = scheduler.schedule()
        read(scheduler, step, 0)
        step = following
        found.append((step.num_drafts, bool(step.resumes) and step.resumes[0]))
    # two launches are under way
    assert found[-1] == (DRAFTS, True)


@pytest.mark.parametrize("alone", [True, False])
def test_waiting_for_nothing_is_soon_given_up(alone: bool):
    """As many launches wait as 1.5 steps and an eightieth of each pay for, at a tenth of a step."""
    scheduler = engine()
    add(scheduler, "a", Anything([7] * 5000 if alone else []))
    if not alone:
        add(scheduler, "bb", None)
    waited, steps = 0, 1000
    for _ in range(steps):
        step = scheduler.schedule()
        read(scheduler, step, 0)
        waited += step.num_drafts > 0
    assert 15 <= waited <= (1.5 + steps / 80) / 0.1 + 1
    # what is won pays for more
    before = waited
    for _ in range(200):
        step = scheduler.schedule()
        read(scheduler, step, 2)
        waited += step.num_drafts > 0
    assert waited - before > 180


def test_waiting_for_drafts_that_are_not_there_is_soon_given_up():
    """What seems to follow two tokens that are not read is gone each time that they are: no launch has drafts, and
    waiting costs as much.
    """
    scheduler = engine()
    matcher = Anything([])
    add(scheduler, "a", matcher)
    unread, waited, done = [scheduler.schedule(), scheduler.schedule()], 0, 0
    while done < 1000:
        matcher.next = [7] * 9
        step = scheduler.schedule()
        if step.rows:
            read(scheduler, unread.pop(0), 0)
            unread.append(step)
            done += 1
            continue
        waited += 1
        # one wait, in which the scheduler is asked several times
        while unread:
            read(scheduler, unread.pop(0), 0)
            if unread:
                assert scheduler.schedule().rows == []
        matcher.next = []
        unread = [scheduler.schedule(), scheduler.schedule()]
        assert [step.num_drafts for step in unread] == [0, 0]
        done += 2
    assert 15 <= waited <= (1.5 + done / 80) / 0.1 + 1


def add_long(scheduler: Scheduler, name: str) -> None:
    """A request that computes its prompt for 100 steps."""
    scheduler.add_request(Request(name, [3] * 3200, SamplingParams(max_tokens=1)))


def test_drafts_and_prompts_take_turns():
    scheduler = engine()
    request = add(scheduler, "a", None)
    read(scheduler, scheduler.schedule(), 0)
    add_long(scheduler, "b")
    found = []
    unread = [scheduler.schedule()]
    for _ in range(20):
        unread.append(scheduler.schedule())
        step = unread.pop(0)
        read(scheduler, step, 2)
        found.append((step.num_drafts, step.is_apart, len(step.rows), request in step.requests))
    # while two launches are under way, nobody but the device knows where a request with drafts stands
    prompt, drafts = (0, False, 1, False), (DRAFTS, True, 1, True)
    assert found[1:] == [drafts, prompt] * 9 + [drafts]
    assert len(request.all_token_ids) > 5 + 10 * 3


def test_wrong_drafts_beside_prompts_are_soon_given_up():
    scheduler = engine()
    add(scheduler, "a", None)
    read(scheduler, scheduler.schedule(), 0)
    apart, steps = 0, 0
    for number in range(10):
        add_long(scheduler, str(number))
        for _ in range(90):
            step = scheduler.schedule()
            read(scheduler, step, 0)
            apart, steps = apart + step.is_apart, steps + 1
    assert 2 <= apart <= 1.5 + steps / 80 + 1


def test_a_restricted_request_beside_prompts_has_single_steps():
    scheduler = engine()
    add(scheduler, "a", Anything([7] * 5000))
    read(scheduler, scheduler.schedule(), 0)
    add_long(scheduler, "b")
    for _ in range(20):
        step = scheduler.schedule()
        read(scheduler, step, 0)
        assert step.num_drafts == 0 and len(step.rows) == 2
