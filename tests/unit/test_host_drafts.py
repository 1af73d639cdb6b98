"""Drafts that the host makes for restricted requests, against the rule written down in plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from support.tiny_model import EOS, VOCAB_SIZE, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.config.structured_outputs import StructuredOutputsConfig
from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.drafts import HostDraftRule, HostDrafts, masks_of
from jaxllm.structured.matcher import Matcher

WORDS = -(-VOCAB_SIZE // 32)
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())


def compiled(regex: str) -> Matcher:
    compiler = GrammarCompiler(
        TOKENIZER, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}), config=StructuredOutputsConfig()
    )
    return compiler.compile(StructuredOutputsParams(regex=regex)).result().matcher()


#: few letters, so that runs come again; some have no choice behind them
GRAMMAR = compiled("(a(b|c)|bbca|c){0,40}d{3}")
LETTERS = [TOKENIZER.get_vocab()[letter] for letter in "abcd"]


def allowed(matcher: Matcher) -> set[int]:
    mask = np.full(WORDS, -1, np.int32)
    assert matcher.fill_mask(mask) is None
    return {token for token in range(VOCAB_SIZE) if mask[token // 32] >> (token % 32) & 1}


def by_the_rule(tokens: list[int], matcher: Matcher, rule: HostDraftRule) -> list[int]:
    """Where one token alone may come, that one; else what follows the first occurrence of the longest run that all
    tokens end with, and from there on, until something else has no choice. None behind the grammar's end.
    """
    drafts: list[int] = []
    place = None
    while len(drafts) < rule.num_drafts:
        options = allowed(matcher)
        if options == {EOS}:
            return drafts
        if len(options) == 1:
            (token,), place = options, None
        else:
            place = first_behind([*tokens, *drafts], tokens, rule) if place is None else place + 1
            if place is None or place >= len(tokens) or tokens[place] not in options:
                return drafts
            token = tokens[place]
        drafts.append(token)
        assert matcher.advance(token) is None
    return drafts


def first_behind(ended: list[int], tokens: list[int], rule: HostDraftRule) -> int | None:
    for length in range(rule.max_match, rule.min_match - 1, -1):
        for first in range(len(tokens) - length):
            if len(ended) >= length and tokens[first : first + length] == ended[-length:]:
                return first + length
    return None


@given(
    prompt=st.lists(st.sampled_from([*LETTERS, EOS]), max_size=30),
    choices=st.lists(st.integers(0, 3), max_size=40),
    rule=st.sampled_from([HostDraftRule(4, 1, 3), HostDraftRule(1, 1, 1), HostDraftRule(6, 2, 2)]),
)
@example(prompt=[LETTERS[0], LETTERS[3], EOS, LETTERS[0]], choices=[0], rule=HostDraftRule(4, 1, 3))
def test_it_is_the_rule(prompt: list[int], choices: list[int], rule: HostDraftRule):
    """Step by step, of one object that sees the text grow."""
    matcher, drafts, tokens = GRAMMAR.copy(), HostDrafts(rule), list(prompt)
    for choice in choices:
        found = drafts.find(tokens, matcher)
        assert found == by_the_rule(tokens, matcher.copy(), rule)
        checked, error = masks_of(found, matcher, WORDS)
        assert error is None and checked.drafts == found and len(checked.masks) == 1 + len(found)
        ahead = matcher.copy()
        for token, mask in zip([*found, None], checked.masks, strict=True):
            assert {t for t in range(VOCAB_SIZE) if mask[t // 32] >> (t % 32) & 1} == allowed(ahead)
            assert token is None or ahead.advance(token) is None
        options = sorted(allowed(matcher) - {EOS})
        if not options:
            break
        tokens.append(options[choice % len(options)])
        assert matcher.advance(tokens[-1]) is None


def test_what_the_token_that_completes_is():
    """A draft, where an end token follows it; none, where the request ends with it."""
    for ends, last in ((False, 3), (True, 2)):
        drafts = HostDrafts(HostDraftRule(9, 1, 1), ends_when_complete=ends)
        assert drafts.find(LETTERS, compiled("abc")) == LETTERS[:last]


def test_vectors_of_a_prompt_are_passed_over():
    tokens = [0, LETTERS[2], LETTERS[0], LETTERS[2]]
    assert HostDrafts(HostDraftRule(2, 1, 1)).find(tokens, GRAMMAR) == [LETTERS[0], LETTERS[2]]
    assert HostDrafts(HostDraftRule(2, 1, 1), first=2).find(tokens, GRAMMAR) == []
