"""`repetition_detection` against its definition, and its place among the ends of a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm import SamplingParams
from jaxllm.api.sampling_params import RepetitionDetectionParams
from jaxllm.engine.request import Request, RequestStatus, ends_in_repetition


def by_definition(tokens: list[int], least: int, most: int, count: int) -> bool:
    """Some pattern of an allowed size, written `count` times, is what the tokens end with."""
    patterns = (tokens[len(tokens) - size :] for size in range(max(least, 1), most + 1) if size <= len(tokens))
    return any(tokens[max(0, len(tokens) - len(p) * count) :] == p * count for p in patterns)


@given(
    st.lists(st.integers(0, 1), max_size=14),
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(2, 4),
)
def test_it_is_what_the_definition_says(
    before: list[int], pattern: list[int], times: int, most: int, least: int, count: int
):
    least = min(least, most)
    tokens = before + pattern * times
    params = RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=count)
    for end in range(1, len(tokens) + 1):
        assert ends_in_repetition(tokens[:end], 0, params) == by_definition(tokens[:end], least, most, count)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_the_prompt_does_not_count(prompt: list[int], outputs: list[int]):
    params = RepetitionDetectionParams(max_pattern_size=3, min_count=2)
    expected = by_definition(outputs, 1, 3, 2)
    assert ends_in_repetition(prompt + outputs, len(prompt), params) == expected


@pytest.mark.parametrize(
    ("arguments", "tokens", "expected"),
    [
        ({}, [5, 5], (RequestStatus.FINISHED_REPETITION, "repetition_detected")),
        ({}, [5, 6], (None, None)),
        ({}, [9, 9], (RequestStatus.FINISHED_STOPPED, None)),
        ({"stop_token_ids": [5]}, [5, 5], (RequestStatus.FINISHED_STOPPED, 5)),
        ({"max_tokens": 2}, [5, 5], (RequestStatus.FINISHED_LENGTH, None)),
        ({"min_tokens": 3}, [5, 5], (None, None)),
        ({"min_tokens": 2}, [5, 5], (RequestStatus.FINISHED_REPETITION, "repetition_detected")),
    ],
)
def test_other_ends_come_first(arguments: dict, tokens: list[int], expected: tuple):
    params = SamplingParams(repetition_detection={"max_pattern_size": 1, "min_count": 2}, **arguments)
    request = Request("a", [1], params, eos_token_ids=[9])
    request.max_total_tokens = 1 + (params.max_tokens or 16)
    request.all_token_ids += tokens
    assert request.check_stop() == expected


def test_sizes_of_zero_ask_for_nothing():
    request = Request("a", [1], SamplingParams(repetition_detection=RepetitionDetectionParams()))
    assert request.repetition is None
