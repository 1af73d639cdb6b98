"""Adapters by their names: each has a number of its own, whoever else loads one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.engine.adapters import AdapterStore
from jaxllm.entrypoints.openai.adapters import NamedAdapters


class Files:
    """An adapter; one that is called "broken" cannot be read."""

    def __init__(self, request: LoRARequest):
        self._name = request.lora_name

    def have_changed(self) -> bool:
        return False

    def read(self) -> str:
        if self._name == "broken":
            raise OSError("the file is cut off")
        return self._name


@contextlib.contextmanager
def named(opened: Callable[[LoRARequest], Files] = Files) -> Iterator[tuple[NamedAdapters, AdapterStore]]:
    store = AdapterStore(opened, max_loras=2, max_cpu_loras=2)
    yield NamedAdapters(store, ["model"]), store
    store.shutdown()


def number(adapters: NamedAdapters, name: str) -> int:
    request = adapters.get(name)
    assert request is not None
    return request.lora_int_id


def test_two_that_are_loaded_at_once():
    both = threading.Barrier(2)

    def opened(request: LoRARequest) -> Files:
        # until the other one is here too, if it comes
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.1)
        return Files(request)

    with named(opened) as (adapters, store):
        threads = [threading.Thread(target=adapters.load, args=(name, f"/{name}")) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {number(adapters, "first"), number(adapters, "second")} == store.numbers() == {1, 2}


def test_one_that_could_not_be_read_keeps_its_number():
    with named() as (adapters, store):
        adapters.load("broken", "/broken")
        request = adapters.get("broken")
        assert request is not None
        broken = store.get(request)
        while not store.is_ready(broken):
            time.sleep(0.001)
        assert broken.error and not store.numbers()
        adapters.load("good", "/good")
        assert number(adapters, "good") != number(adapters, "broken")


def test_an_adapter_is_unloaded_by_its_own_number():
    with named() as (adapters, _):
        adapters.load("first", "/first")
        with pytest.raises(ValidationError, match="lora_int_id=7 is not 'first', whose number is 1"):
            adapters.unload("first", 7)
        assert list(adapters) == ["first"]
        assert adapters.unload("first", 1) and not adapters.unload("first")
