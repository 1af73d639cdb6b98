"""Ctrl-C inside of what must not be interrupted."""

from __future__ import annotations

import signal

import pytest

from jaxllm.engine.interrupt import DeferredInterrupt


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
