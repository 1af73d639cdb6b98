"""The table of all pairs of capabilities: each works together, or is refused by name.

Capabilities are what a request may ask for (`KINDS`), how an engine may be set (`SETTINGS`), and how one may ask
(streams, tasks, beams, pooling, sleep). The oracle of a pair with a setting is the engine without settings; of two
options of requests, what each of them promises.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.own_process import found_by
from support.pairs import BUDGET, ENGINES, KINDS, LETTERS, SETTINGS, arguments_of, assert_same_answer

from jaxllm import LLM, BeamSearchParams
from jaxllm.api.errors import ValidationError

#: pairs that are refused -> what the error says
REFUSED = {
    ("deterministic", "tensor parallel"): "deterministic=True with tensor_parallel_size=2",
}
#: pairs that need more devices than this file's engines have, tested in test_data_parallel.py
ELSEWHERE = [("tensor parallel", "data parallel")]
#: ways to ask that hold for whatever is asked
WAYS = ["generated", "streamed", "after sleep"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engines answered, in one process of their own, which has two devices."""
    return found_by("support.pairs", tmp_path_factory.mktemp("pairs"))


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(KINDS) <= set(got) <= set(wanted)
    for name, answer in got.items():
        assert_same_answer(answer, wanted[name], name)


@pytest.mark.parametrize(
    "pair", [pair for pair in itertools.combinations(SETTINGS, 2) if pair not in ELSEWHERE], ids=" + ".join
)
def test_two_settings(found: dict[str, Any], tiny_model: Path, pair: tuple[str, str]):
    """Whatever is asked, in whatever way, is answered as by an engine that has neither."""
    if pair in REFUSED:
        with pytest.raises(ValidationError, match=REFUSED[pair]):
            LLM(tiny_model, **arguments_of(list(pair)))
        return
    engines = [name for name, settings in ENGINES.items() if set(pair) <= set(settings)]
    assert engines
    for name in engines:
        for way in WAYS:
            assert_same(found[name][way], found["plain"]["generated"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_with_beams(found: dict[str, Any], setting: str):
    for name in (name for name, settings in ENGINES.items() if setting in settings):
        assert found[name]["beams"] == found["plain"]["beams"]
        assert len(found[name]["beams"][0]) == 3


def test_the_settings_were_met(found: dict[str, Any]):
    for name, settings in ENGINES.items():
        assert (found[name]["preemptions"] > 0) == ("preemption" in settings), name
        assert (found[name]["hits"] > 0) == ("prefix caching" in settings), name
        assert (found[name]["hits on the host"] > 0) == ("KV offloading" in settings), name
        assert (found[name]["right drafts"] > 0) == ("drafts" in settings), name


def test_tasks_of_an_event_loop(found: dict[str, Any]):
    assert_same(found["all, split"]["tasks"], found["plain"]["generated"])


def test_pooling_with_the_settings_that_it_takes(found: dict[str, Any]):
    np.testing.assert_allclose(found["pooling"]["all"], found["pooling"]["plain"], atol=1e-5)


@pytest.mark.parametrize("setting", ["deterministic"])
def test_pooling_refuses(tiny_model: Path, setting: str):
    with pytest.raises(ValidationError, match=r"deterministic=True is only available for models that generate"):
        LLM(tiny_model, runner="pooling", convert="embed", **arguments_of([setting]))


@pytest.mark.parametrize("kind", sorted({name for params in KINDS.values() for name in params} - {"temperature"}))
def test_beams_take_no_options_of_sampling(kind: str):
    given: dict[str, Any] = {kind: 1}
    with pytest.raises(TypeError):
        BeamSearchParams(beam_width=2, max_tokens=4, **given)


def promised(answer: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """What each of a request's options promises, whatever the other one is."""
    promises: dict[str, Callable[[int], object]] = {
        "n": lambda i: len(answer["text"]) == 2,
        "logprobs": lambda i: len(answer["logprobs"][i]) == len(answer["token_ids"][i]),
        "prompt logprobs": lambda i: len(answer["prompt_logprobs"]) == answer["prompt_tokens"] - 1,
        "stop string": lambda i: "min_tokens" in kinds or not re.search("c|ab", answer["text"][i]),
        "min_tokens": lambda i: len(answer["token_ids"][i]) >= 9 or ended_otherwise(answer["reason"][i], kinds),
        "bad words": lambda i: not re.search("a|dd", answer["text"][i]),
        "repetition detection": lambda i: "min_tokens" in kinds or not re.search(r"(.{1,3})\1\1.", answer["text"][i]),
    }
    for index, text in enumerate(answer["text"]):
        if "structured outputs" in kinds and "thinking budget" not in kinds:
            # what ended before the grammar did is a beginning of what it allows
            whole = answer["reason"][index] == ["stop", None]
            assert re.fullmatch("(ab|cd|fg){2,9}" if whole else "(ab|cd|fg)*[acf]?", text), text
        if "thinking budget" in kinds and ")" not in text:
            assert len(text) <= BUDGET, text
        for kind in kinds:
            assert promises.get(kind, bool)(index) or kind not in promises, f"{kind}: {answer}"
    assert len(answer["text"]) == (2 if "n" in kinds else 1)


def ended_otherwise(reason: list[Any], kinds: tuple[str, ...]) -> bool:
    """Whether what ended a request is no stop token: a grammar that is complete, or a repetition."""
    return reason[1] not in LETTERS and bool({"structured outputs", "repetition detection"} & set(kinds))


@pytest.mark.parametrize("pair", [*itertools.combinations(KINDS, 2)], ids=" + ".join)
def test_two_options_of_a_request(found: dict[str, Any], pair: tuple[str, str]):
    promised(found["plain"]["generated"][" + ".join(pair)], pair)


def test_no_option_is_without_effect(found: dict[str, Any]):
    """Each option changes what is generated, or adds to it."""
    answers = found["plain"]["generated"]
    common = answers["logprobs"]["text"]
    for kind in KINDS:
        answer = answers[kind]
        assert answer["text"] != common or answer["logprobs"] != [[]] or answer["prompt_logprobs"], kind
