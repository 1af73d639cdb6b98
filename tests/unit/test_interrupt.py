"""Ctrl-C inside of what must not be interrupted."""

from __future__ import annotations

import signal

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_start_does_not_lose_it_in_a_finalizer():
    done = []
    with pytest.raises(KeyboardInterrupt), StartInterrupt() as interrupt:
        Finalized()
        done.append(True)
        interrupt.check()
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
