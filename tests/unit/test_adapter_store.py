"""Which adapters the host's memory keeps, and what they hold on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.adapters import Adapter, AdapterStore
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.adapters import AdapterSlots
from jaxllm.engine.step import SchedulerOutput


def opened(request: LoRARequest) -> Callable[[], str]:
    """What reads an adapter, whose "matrices" are its name."""
    return lambda: request.lora_name


@pytest.fixture
def store() -> Iterator[AdapterStore]:
    store = AdapterStore(opened, max_loras=2, max_cpu_loras=2)
    yield store
    store.shutdown()


def named(number: int, *, load_inplace: bool = False) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, f"/{number}", load_inplace=load_inplace)


def ready(store: AdapterStore, number: int) -> Adapter:
    adapter = store.get(named(number))
    while not store.is_ready(adapter):
        time.sleep(0.001)
    return adapter


def request_of(adapter: Adapter) -> Request:
    return Request("request", [1], SamplingParams(), adapter=adapter, extra_keys=(adapter.key,))


def admit(slots: AdapterSlots, adapter: Adapter) -> tuple[Request, SchedulerOutput]:
    request, step = request_of(adapter), SchedulerOutput.empty(0)
    assert slots.find(request)
    slots.take(request, step)
    return request, step


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_pinned_adapter_that_is_gone_keeps_no_slot(store: AdapterStore, how: str):
    slots = AdapterSlots(1, store)
    request, _ = admit(slots, ready(store, 1))
    store.pin(1)
    slots.release(request)
    if how == "removed":
        store.remove(1)
    else:
        assert store.get(named(1, load_inplace=True)).is_pinned
    _, step = admit(slots, ready(store, 2))
    assert step.adapter_loads == [(0, "adapter 2")]


def test_an_adapter_that_goes_between_found_and_taken_is_taken(store: AdapterStore):
    slots = AdapterSlots(1, store)
    request, step = request_of(ready(store, 1)), SchedulerOutput.empty(0)
    assert slots.find(request)
    store.remove(1)
    slots.take(request, step)
    assert step.adapter_loads == [(0, "adapter 1")]


def test_pinned_adapters_count_among_those_in_memory(store: AdapterStore):
    pinned = ready(store, 1)
    store.pin(1)
    others = [ready(store, number) for number in (2, 3, 4)]
    assert [adapter.matrices is not None for adapter in (pinned, *others)] == [True, False, False, True]


def test_who_waits_for_a_busy_slot_takes_one_that_becomes_free_before(store: AdapterStore):
    slots = AdapterSlots(2, store)
    first, second = (ready(store, number) for number in (1, 2))
    admit(slots, first)
    users = [admit(slots, second)[0] for _ in range(2)]
    third = ready(store, 3)
    # it waits for the slot that fewer requests use
    assert not slots.find(request_of(third)) and not slots.find(request_of(first))
    for request in users:
        slots.release(request)
    _, step = admit(slots, third)
    assert step.adapter_loads == [(1, "adapter 3")]
    # nobody waits for the first one any more
    assert slots.find(request_of(first))
