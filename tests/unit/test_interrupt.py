"""Ctrl-C inside of what must not be interrupted."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable

import pytest

from jaxllm.engine.interrupt import DeferredInterrupt, StartInterrupt


def test_it_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_does_not_swallow_it():
    with pytest.raises(KeyboardInterrupt) as caught, DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("a prompt is refused")
    assert isinstance(caught.value.__context__, ValueError)


class Finalized:
    """Python drops what its finalizer raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_a_start_does_not_lose_it_in_a_finalizer():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt() as interrupt:
        Finalized()
        done.append(True)
        interrupt.check()
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_start_does_not_lose_it_while_garbage_is_collected():
    """In a function that anybody has put there, whatever its name; pytest would tell of what is dropped."""
    done = []

    def told(phase: str, info: dict[str, int]) -> None:
        # not in a smaller collection, which may come before the start does
        if phase == "stop" and info["generation"] == 2 and not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(told)
    try:
        with pytest.raises(KeyboardInterrupt), StartInterrupt() as interrupt:
            gc.collect()
            interrupt.check()
    finally:
        gc.callbacks.remove(told)
    assert done


def test_a_start_that_was_done_before_it_was_asked_ends_with_it():
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        Finalized()


def test_a_start_that_asks_all_the_time_is_interrupted_where_it_asks():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt() as interrupt:
        interrupt.is_polled = True
        signal.raise_signal(signal.SIGINT)
        done.append(True)
        interrupt.check()
    assert done


def test_a_start_that_does_not_ask_is_interrupted_where_it_is():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert not done


def in_a_finalizer() -> None:
    Finalized()


def in_a_callback() -> None:
    kept = threading.Event()
    reference = weakref.ref(kept, lambda _: signal.raise_signal(signal.SIGINT))
    del kept
    assert reference() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("press", [in_a_finalizer, in_a_callback])
def test_what_python_drops_is_raised_again_wherever_a_start_is(press: Callable[[], None]):
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        press()
        done.append("pressed")
        threading.Event().wait(60)
        done.append("waited")
    assert done == ["pressed"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_library_has_caught_is_raised_again():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            done.append("caught")
        threading.Event().wait(60)
        done.append("waited")
    assert done == ["caught"]


def test_an_interrupt_says_more_than_the_error_that_a_library_has_made_of_it():
    with pytest.raises(KeyboardInterrupt) as caught, StartInterrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("a callback failed") from None
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("is_polled", [False, True])
def test_cleaning_up_is_not_interrupted(monkeypatch: pytest.MonkeyPatch, is_polled: bool):
    monkeypatch.setattr("jaxllm.engine.interrupt.AGAIN", 0.01)
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt() as interrupt:
        try:
            interrupt.is_polled = is_polled
            signal.raise_signal(signal.SIGINT)
            interrupt.check()
        finally:
            interrupt.is_polled = False
            for _ in range(10):
                threading.Event().wait(0.01)
            done.append(True)
    assert done


def test_a_second_one_interrupts_cleaning_up():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append(True)
    assert not done


def test_nothing_is_raised_after_a_start():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), StartInterrupt():
        signal.raise_signal(signal.SIGINT)
    assert threading.active_count() == before


def test_a_start_leaves_the_handler_of_somebody_else_in_charge():
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with StartInterrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            interrupt.check()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [1]
