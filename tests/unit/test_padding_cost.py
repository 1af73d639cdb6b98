"""`enforce_eager=True` says once when it costs more than it saves."""

from __future__ import annotations

import logging

import pytest

from jaxllm.runner.buckets import make_buckets
from jaxllm.runner.padding_cost import STEPS, PaddingCost


def warnings(caplog: pytest.LogCaptureFixture, sizes: list[tuple[int, int]]) -> list[str]:
    """What is said of steps of so many (tokens, sequences) in an engine of up to 512 tokens of 64 sequences."""
    caplog.set_level(logging.WARNING, "jaxllm")
    cost = PaddingCost(make_buckets(512, 64, eager=True), make_buckets(512, 64))
    for tokens, seqs in sizes:
        cost.count(tokens, seqs)
    return [record.getMessage() for record in caplog.records]


def test_one_sequence_costs_no_more_than_without_it(caplog: pytest.LogCaptureFixture):
    assert not warnings(caplog, [(400, 1), *[(1, 1)] * 100])


def test_a_few_sequences_are_padded_to_32_tokens(caplog: pytest.LogCaptureFixture):
    # (6 + 32) / (6 + 8)
    (said,) = warnings(caplog, [(3, 3)] * 5 * STEPS)
    assert "enforce_eager=True costs about 2.7 times the time" in said and "1, 32, 512 tokens" in said


def test_nothing_is_said_of_a_single_prompt(caplog: pytest.LogCaptureFixture):
    # 40 tokens are padded to 512 instead of 64
    assert not warnings(caplog, [(40, 1)] * (STEPS - 1))


def test_full_steps_are_not_complained_of(caplog: pytest.LogCaptureFixture):
    assert not warnings(caplog, [(512, 64), (30, 30)] * STEPS)
