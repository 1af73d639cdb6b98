"""Several replicas behind one engine's interface, under random traffic, over devices that check what they read and that
fail at times.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fake_device import VOCAB_SIZE, Done, FakeDevice, generate

from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.observe.metrics import EngineMetrics
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.request import Request
from jaxllm.engine.step import SchedulerOutput

BLOCK_SIZE = 4
LIMITS = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=40)


class Broken(FakeDevice):
    """A device that fails at its next launch, where it is told to."""

    fails = False

    def execute(self, scheduled: SchedulerOutput) -> Done:
        if self.fails:
            self.fails = False
            raise RuntimeError("the device is gone")
        return super().execute(scheduled)


def replicas(count: int, num_blocks: int = 16) -> Replicas:
    cache = CacheConfig(
        block_size=BLOCK_SIZE, num_blocks=num_blocks, groups=(KVCacheGroup(layers=(0,)),), enable_prefix_caching=True
    )
    salts: dict[str, str | None] = {}
    cores = []
    for number in range(count):
        device = Broken(cache, LIMITS)
        device.salts = salts
        metrics = EngineMetrics("fake", max_model_len=LIMITS.max_model_len, engine=number)
        cores.append(EngineCore(LIMITS, cache, device, None, metrics))
    return Replicas(cores)


def device(core: EngineCore) -> Broken:
    runner: Any = core._runner
    return runner


def add(engine: Replicas, name: str, prompt: list[int], max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.FINAL_ONLY)
    request = Request(name, prompt, params)
    device(engine.cores[0]).salts[name] = None
    engine.add_request(request, None)
    return request


def run(engine: Replicas) -> dict[str, RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    return {output.request_id: output for output in outputs + engine.drain() if output.finished}


def where(engine: Replicas, request: Request) -> int:
    return engine._of[request.request_id].number


class ReplicasMachine(RuleBasedStateMachine):
    engine: Replicas | None = None

    @initialize(count=st.integers(1, 3), num_blocks=st.integers(11, 20))
    def build(self, count: int, num_blocks: int) -> None:
        self.engine = replicas(count, num_blocks)
        self.requests: list[Request] = []
        self.outputs: dict[str, RequestOutput] = {}
        self.aborted: set[str] = set()

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.finished and output.request_id not in self.outputs
            self.outputs[output.request_id] = output

    def _live(self) -> set[str]:
        return {request.request_id for request in self.requests} - self.outputs.keys()

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 16),
        own=st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=4),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
    )
    def add(self, family: int, shared: int, own: list[int], max_tokens: int, n: int) -> None:
        assert self.engine is not None
        prompt = [1 + (family + index) % (VOCAB_SIZE - 1) for index in range(shared)] + own
        for _ in range(n):
            self.requests.append(add(self.engine, f"r{len(self.requests)}", prompt, max_tokens))

    @rule(turns=st.integers(1, 6))
    def step(self, turns: int) -> None:
        assert self.engine is not None
        for _ in range(turns):
            self._take(self.engine.step())

    @rule(numbers=st.lists(st.integers(0, 40), max_size=3, unique=True))
    def abort(self, numbers: list[int]) -> None:
        """Which of the requests live, threads decide: so any may be named."""
        assert self.engine is not None
        ids = [f"r{number}" for number in numbers]
        self._take(self.engine.abort(ids))
        self.aborted.update(ids)

    @rule()
    def drain(self) -> None:
        assert self.engine is not None
        self._take(self.engine.drain())
        assert all(replica.turn is None for replica in self.engine._replicas)

    @rule()
    def preempt_all(self) -> None:
        assert self.engine is not None
        self._take(self.engine.drain())
        self.engine.preempt_all()
        assert not any(core.scheduler.running for core in self.engine.cores)

    @rule(number=st.integers(0, 2))
    def fail(self, number: int) -> None:
        assert self.engine is not None
        device(self.engine.cores[number % len(self.engine.cores)]).fails = True

    @invariant()
    def what_is_counted_is_there(self) -> None:
        if self.engine is None:
            return
        engine, live = self.engine, self._live()
        # those whose end waits to be taken are counted no more
        assert set(engine._of) <= live
        for replica in engine._replicas:
            held = replica.held
            assert replica.load == sum(one.tokens for one in held.values()) >= 0
            assert set(held) == {name for name, other in engine._of.items() if other is replica}
            assert replica._expected.total() == sum(len(one.hashes) for one in held.values())

    def teardown(self) -> None:
        if self.engine is None:
            return
        engine = self.engine
        while engine.has_unfinished:
            self._take(engine.step())
        self._take(engine.drain())
        assert engine.is_idle and not self._live()
        for request in self.requests:
            output = self.outputs[request.request_id]
            if output.error is not None:
                assert "the device is gone" in output.error
                continue
            length = request.num_prompt_tokens + request.params.max_tokens
            tokens, reason, _ = generate(
                request.prompt_token_ids, None, min(length, LIMITS.max_model_len), frozenset(), frozenset()
            )
            (completion,) = output.outputs
            if completion.finish_reason == "abort":
                assert request.request_id in self.aborted
                tokens = tokens[: len(completion.token_ids)]
            else:
                assert completion.finish_reason == reason
            assert list(completion.token_ids) == tokens
        for replica in engine._replicas:
            assert not (replica.load or replica.held or replica._expected or replica.arrived)
            assert replica.core.scheduler.kv_cache_manager.pool.num_used == 0
        engine.shutdown()
        for replica in engine._replicas:
            # one that nothing was sent to has not begun
            if replica.thread is not None:
                replica.thread.join(10)
                assert not replica.thread.is_alive()


TestReplicasMachine = ReplicasMachine.TestCase
TestReplicasMachine.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_prompt_goes_to_the_replica_that_has_its_beginning():
    engine = replicas(3)
    first = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    others = [[3] * 9, [4] * 9]
    places = [where(engine, add(engine, f"a{i}", prompt, 2)) for i, prompt in enumerate([first, *others])]
    assert sorted(places) == [0, 1, 2]
    run(engine)
    again = [where(engine, add(engine, f"b{i}", prompt[:8] + [1], 2)) for i, prompt in enumerate([*others, first])]
    assert again == [*places[1:], places[0]]
    run(engine)
    hits = [m.value for m in engine.metrics() if isinstance(m, Counter) and m.name == "vllm:prefix_cache_hits"]
    assert hits == [8, 8, 8]
    engine.shutdown()


def test_completions_of_one_prompt_share_what_is_not_computed_yet():
    engine = replicas(2)
    long = [1 + index % 9 for index in range(24)]
    assert [where(engine, add(engine, f"a{i}", long, 2)) for i in range(3)] == [0, 0, 0]
    engine.abort([f"a{i}" for i in range(3)])
    short = [[1], [1], [1], [1]]
    assert [where(engine, add(engine, f"b{i}", prompt, 2)) for i, prompt in enumerate(short)] == [0, 1, 0, 1]
    engine.abort([f"b{i}" for i in range(4)])
    engine.shutdown()


def test_a_common_prefix_draws_no_more_than_it_saves():
    """One prefix for all, cached on one replica: the others get their part."""
    engine = replicas(2)
    system = [1, 2, 3, 4, 5, 6, 7, 8]
    add(engine, "first", [*system, 1], 1)
    run(engine)
    for index in range(20):
        add(engine, f"r{index}", [*system, 1 + index % 9], 8)
    loads = [replica.load for replica in engine._replicas]
    assert max(loads) - min(loads) <= 8 + 17
    run(engine)
    engine.shutdown()


def test_a_failure_is_its_replicas_alone(caplog: pytest.LogCaptureFixture):
    engine = replicas(2)
    requests = [add(engine, f"r{index}", [1 + index], 6) for index in range(4)]
    lost = {request.request_id for request in requests if where(engine, request) == 1}
    assert len(lost) == 2
    device(engine.cores[1]).fails = True
    outputs = run(engine)
    assert {name for name, output in outputs.items() if output.error} == lost
    assert all(outputs[name].error == "replica 1 failed: RuntimeError('the device is gone')" for name in lost)
    assert "Replica 1 failed; its requests are ended" in caplog.text
    add(engine, "after", [2], 3)
    assert run(engine)["after"].error is None
    engine.shutdown()


def test_requests_are_refused_as_by_one_engine():
    engine = replicas(2)
    add(engine, "r", [1], 2)
    with pytest.raises(ValidationError, match="Request id 'r' is in use"):
        add(engine, "r", [2], 2)
    with pytest.raises(ValidationError, match="max_model_len|maximum model length"):
        add(engine, "long", [1] * 41, 2)
    assert list(engine._of) == ["r"]
    run(engine)
    engine.shutdown()


def test_a_replica_that_is_slow_holds_up_no_other():
    """One replica's device waits until the other one has answered, which the test would never see otherwise."""
    import threading

    engine = replicas(2)
    answered, execute = threading.Event(), device(engine.cores[0]).execute

    def waiting(scheduled: SchedulerOutput) -> Done:
        assert answered.wait(60)
        return execute(scheduled)

    device(engine.cores[0]).execute = waiting
    slow, fast = add(engine, "slow", [1], 2), add(engine, "fast", [2], 2)
    assert (where(engine, slow), where(engine, fast)) == (0, 1)
    outputs: list[RequestOutput] = []
    while not outputs:
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["fast"]
    # and takes requests meanwhile
    add(engine, "later", [1, 1, 1], 2)
    answered.set()
    assert set(run(engine)) == {"slow", "later"}
    engine.shutdown()
