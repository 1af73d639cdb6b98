"""`ThinkingMatcher` against a simulation that looks at the whole text anew for each token."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.errors import ValidationError
from jaxllm.config.structured_outputs import ReasoningConfig
from jaxllm.structured.thinking import ReasoningMarks, ThinkingMatcher, reasoning_marks

VOCAB = 40
SINGLE = ReasoningMarks(start=(1,), end=(2,), forced_end=(2,))
LONG = ReasoningMarks(start=(1, 3), end=(2, 2), forced_end=(7, 35, 2, 2))


def allowed(matcher: ThinkingMatcher) -> list[int]:
    mask = np.full(-(-VOCAB // 32), -1, np.int32)
    assert matcher.fill_mask(mask) is None
    return [t for t in range(VOCAB) if int(mask[t // 32]) >> (t % 32) & 1]


def forced_by_definition(marks: ReasoningMarks, budget: int, prompt: list[int], outputs: list[int]) -> int | None:
    """The token that has to come next, from all tokens so far."""
    inside, used, forced = False, 0, 0
    tail: list[int] = []
    for token in prompt + outputs:
        if forced:
            forced += 1
            if forced > len(marks.forced_end):
                inside, forced, tail = False, 0, []
            continue
        tail.append(token)
        if inside:
            used += 1
            if tuple(tail[-len(marks.end) :]) == marks.end:
                inside, tail = False, []
        elif tuple(tail[-len(marks.start) :]) == marks.start:
            inside, used, tail = True, 0, []
        # what the prompt holds is not forced
        if inside and used >= budget and len(prompt) <= 1:
            forced = 1
    return marks.forced_end[forced - 1] if forced else None


@given(st.integers(0, 2**32), st.integers(0, 5), st.sampled_from([SINGLE, LONG]))
def test_a_spent_budget_forces_the_end_token_by_token(seed: int, budget: int, marks: ReasoningMarks):
    generator = random.Random(seed)
    prompt, outputs = [9], []
    matcher = ThinkingMatcher(marks, budget, prompt)
    for _ in range(40):
        expected = forced_by_definition(marks, budget, prompt, outputs)
        options = allowed(matcher)
        assert options == ([expected] if expected is not None else list(range(VOCAB)))
        if expected is not None:
            assert matcher.may_constrain(0)
        token = generator.choice(options if len(options) == 1 else [1, 2, 3, 5, *marks.start])
        assert matcher.advance(token) is None
        outputs.append(token)


@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 3), st.sampled_from([SINGLE, LONG]))
def test_no_mask_is_missed_while_tokens_are_unread(seed: int, budget: int, unread: int, marks: ReasoningMarks):
    """Where `may_constrain` says no, no continuation by that many tokens leads to a mask."""
    generator = random.Random(seed)
    matcher = ThinkingMatcher(marks, budget, [9])
    for _ in range(30):
        said = matcher.may_constrain(unread)
        for _ in range(unread):
            options = allowed(matcher)
            matcher.advance(generator.choice(options if len(options) == 1 else [1, 2, 3, *marks.start]))
        if len(allowed(matcher)) == 1:
            assert said


@pytest.mark.parametrize(
    ("prompt", "budget", "forced_at"),
    [
        ([5, 1], 0, 0),
        ([5, 1, 6], 1, 0),
        ([5, 1, 6], 3, 2),
        ([5, 1, 6, 2], 0, None),
        ([5, 1, 6, 2, 1], 2, 2),
        ([5, 2], 0, None),
    ],
)
def test_reasoning_that_the_prompt_has_open_counts(prompt: list[int], budget: int, forced_at: int | None):
    matcher = ThinkingMatcher(SINGLE, budget, prompt)
    for position in range(4):
        if position == forced_at:
            assert allowed(matcher) == [2]
            return
        assert len(allowed(matcher)) == VOCAB
        matcher.advance(6)
    assert forced_at is None


class Vocabulary:
    """What of a tokenizer the marks need: single characters, and ``<think>`` and ``</think>`` where it has them."""

    def __init__(self, reasons: bool):
        self._vocabulary = {"<think>": 900, "</think>": 901} if reasons else {"a": 1}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        if text in self._vocabulary:
            return [self._vocabulary[text]]
        return [ord(character) for character in text]


def test_where_the_marks_come_from():
    def marks(reasons: bool, **config: str) -> ReasoningMarks:
        return reasoning_marks(Vocabulary(reasons), ReasoningConfig(**config))  # pyright: ignore[reportArgumentType]

    assert marks(True) == ReasoningMarks(start=(900,), end=(901,), forced_end=(901,))
    with pytest.raises(ValidationError, match="no tokens '<think>' and '</think>'"):
        marks(False)
    assert marks(True, reasoning_parser="qwen3", reasoning_end_str="!") == ReasoningMarks(
        start=(900,), end=(901,), forced_end=(33,)
    )
    assert marks(False, reasoning_start_str="((", reasoning_end_str=")") == ReasoningMarks(
        start=(40, 40), end=(41,), forced_end=(41,)
    )


class Digits:
    """A grammar of tokens 10 to 19."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def may_constrain(self, num_unread: int) -> bool:
        return True

    def fill_mask(self, out: np.ndarray) -> str | None:
        out[0] &= 0x3FF << 10
        out[1:] = 0
        return None

    def advance(self, token_id: int) -> str | None:
        self.seen.append(token_id)
        return None

    def forced(self) -> list[int]:
        return [15] if self.seen == [11] else []

    def copy(self) -> Digits:
        other = Digits()
        other.seen = list(self.seen)
        return other

    @property
    def is_complete(self) -> bool:
        return len(self.seen) == 2

    @property
    def grammar(self) -> None:
        return None


@pytest.mark.parametrize("prompt", [[5], [5, 1]])
def test_a_grammar_begins_behind_the_reasoning(prompt: list[int]):
    grammar = Digits()
    matcher = ThinkingMatcher(SINGLE, 3, prompt, grammar)
    for token in ([] if prompt[-1] == 1 else [1]) + [6, 6, 6]:
        assert len(allowed(matcher)) == VOCAB and not matcher.is_complete
        assert matcher.may_constrain(1)
        matcher.advance(token)
    assert allowed(matcher) == matcher.forced() == [2]
    ahead = matcher.copy()
    ahead.advance(2)
    assert allowed(ahead) == list(range(10, 20)) and allowed(matcher) == [2]
    matcher.advance(2)
    for token in (11, 12):
        assert allowed(matcher) == list(range(10, 20)) and not matcher.is_complete
        assert matcher.forced() == grammar.forced()
        ahead = matcher.copy()
        ahead.advance(19)
        matcher.advance(token)
    assert grammar.seen == [11, 12] and matcher.is_complete


def test_a_grammar_holds_at_once_where_the_prompt_has_closed_the_reasoning():
    assert allowed(ThinkingMatcher(SINGLE, None, [5, 1, 6, 2], Digits())) == list(range(10, 20))
