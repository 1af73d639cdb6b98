"""Which adapters the host's memory keeps, and what they hold on the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.adapters import Adapter, AdapterStore
from jaxllm.engine.request import Request
from jaxllm.engine.scheduling.adapters import AdapterSlots
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput


class Files:
    """An adapter, whose "matrices" are its name."""

    def __init__(self, request: LoRARequest):
        self.request, self.changed = request, False

    def have_changed(self) -> bool:
        return self.changed

    def read(self) -> str:
        return self.request.lora_name


@pytest.fixture
def store() -> Iterator[AdapterStore]:
    store = AdapterStore(Files, max_loras=2, max_cpu_loras=2)
    yield store
    store.shutdown()


def named(number: int) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, f"/{number}")


def ready(store: AdapterStore, number: int) -> Adapter:
    adapter = store.get(named(number))
    while not store.is_ready(adapter):
        time.sleep(0.001)
    return adapter


def request_of(adapter: Adapter) -> Request:
    return Request("request", [1], SamplingParams(), adapter=adapter, extra_keys=(adapter.key,))


def admit(slots: AdapterSlots, adapter: Adapter) -> tuple[Request, SchedulerOutput]:
    request, step = request_of(adapter), SchedulerOutput.empty(0)
    slots.begin()
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
        replaced = LoRARequest("adapter 1", 1, "/another", load_inplace=True)
        assert store.get(replaced).is_pinned
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


def test_a_folder_may_have_several_names_under_one_number(store: AdapterStore):
    one, other = LoRARequest("one", 1, "/folder"), LoRARequest("other", 1, "/folder")
    assert store.get(one) is store.get(other) is store.get(one)
    with pytest.raises(ValidationError, match="lora_int_id=1 is the adapter 'one' of /folder, and not 'one' of"):
        store.get(LoRARequest("one", 1, "/another"))


def test_an_adapter_is_loaded_in_its_own_place_where_its_files_have_changed(store: AdapterStore):
    in_place = LoRARequest("adapter 1", 1, "/1", load_inplace=True)
    first = store.get(in_place)
    # each prompt of a call asks for it
    assert store.get(in_place) is store.get(named(1)) is first
    files = first.files
    assert isinstance(files, Files)
    files.changed = True
    second = store.get(in_place)
    assert second is not first and second.key != first.key and store.get(in_place) is second


def test_an_adapter_is_opened_while_others_ask():
    known: list[set[int]] = []
    in_time: list[bool] = []

    def opened(request: LoRARequest) -> Files:
        # the engine's own thread, which looks at another adapter in each step
        thread = threading.Thread(target=lambda: known.append(store.numbers()), daemon=True)
        thread.start()
        thread.join(timeout=2)
        in_time.append(not thread.is_alive())
        return Files(request)

    store = AdapterStore(opened, max_loras=1, max_cpu_loras=1)
    store.get(named(1))
    store.add(named(2))
    store.shutdown()
    assert in_time == [True, True] and known == [set(), {1}]


def test_a_step_looks_once_at_an_adapter_that_many_wait_for():
    may_read = threading.Event()

    class Slow(Files):
        def read(self) -> str:
            may_read.wait()
            return super().read()

    class Counting(AdapterStore):
        num_looks = 0

        def is_ready(self, adapter: Adapter) -> bool:
            self.num_looks += 1
            return super().is_ready(adapter)

    store = Counting(Slow, max_loras=1, max_cpu_loras=1)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=60, max_loras=1)
    cache = CacheConfig(block_size=4, num_blocks=40, groups=(KVCacheGroup(layers=(0,)),), enable_prefix_caching=False)
    scheduler = Scheduler(config, cache, store)
    adapter = store.get(named(1))
    for number in range(20):
        scheduler.add_request(Request(f"request {number}", [1], SamplingParams(), adapter=adapter))
    store.num_looks = 0
    assert not scheduler.schedule().rows and store.num_looks == 1
    may_read.set()
    while not store.is_ready(adapter):
        time.sleep(0.001)
    assert len(scheduler.schedule().rows) == 4
    store.shutdown()
