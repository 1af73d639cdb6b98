"""What the benchmarks ask of engines: lengths, shared beginnings, files."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.errors import ValidationError
from jaxllm.bench import datasets
from jaxllm.bench.datasets import BenchRequest
from jaxllm.bench.options import add_dataset_options

IDS = list(range(10, 110))


class Words:
    """A tokenizer: each word is its length."""

    all_special_ids = [0, 3]

    def __len__(self) -> int:
        return 8

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def read(*argv: str) -> list[BenchRequest]:
    parser = argparse.ArgumentParser()
    add_dataset_options(parser)
    tokenizer: Any = Words()
    return datasets.read_dataset(parser.parse_args([*argv, "--num-prompts", "6"]), tokenizer)


def test_tokens_are_those_of_the_model_and_of_the_tokenizer(tmp_path: Path):
    tokenizer: Any = Words()
    assert datasets.ordinary_ids(tokenizer) == [1, 2, 4, 5, 6, 7] == datasets.ordinary_ids(tokenizer, 100)
    assert datasets.ordinary_ids(tokenizer, 6) == [1, 2, 4, 5]
    arguments = argparse.Namespace(model=str(tmp_path), load_format="dummy", config=None)
    for config in ({"vocab_size": 6}, {"text_config": {"vocab_size": 6}, "vocab_size": 7}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert datasets.model_vocabulary(arguments) == 6
    arguments.load_format = "safetensors"
    (tmp_path / "config.json").write_text("{")
    assert datasets.model_vocabulary(arguments) is None


def lengths(requests: list[BenchRequest]) -> list[tuple[int, int]]:
    return [(len(request.prompt_token_ids), request.output_len) for request in requests]


@given(
    seed=st.integers(0, 99),
    mean=st.integers(1, 300),
    ratio=st.floats(0, 0.99),
    prefix=st.integers(0, 5),
)
def test_random_lengths_stay_in_their_range(seed: int, mean: int, ratio: float, prefix: int):
    def make() -> list[BenchRequest]:
        draw = random.Random(seed)
        return datasets.random_lengths(
            IDS, 5, draw, input_len=mean, output_len=mean, range_ratio=ratio, prefix_len=prefix
        )

    requests = make()
    assert requests == make()
    assert len({request.prompt_token_ids[:prefix] for request in requests}) == 1
    for request in requests:
        assert set(request.prompt_token_ids) <= set(IDS)
        for length in (len(request.prompt_token_ids) - prefix, request.output_len):
            assert 1 <= length and mean * (1 - ratio) - 1 <= length <= mean * (1 + ratio) + 1


def test_special_tokens_are_not_drawn():
    requests = read("--input-len", "50", "--output-len", "4")
    assert lengths(requests) == [(50, 4)] * 6
    assert {token for request in requests for token in request.prompt_token_ids} == {1, 2, 4, 5, 6, 7}


def test_lengths_like_sharegpt_are_lognormal_within_the_filter():
    found = np.array(lengths(datasets.sharegpt_like(IDS, 4000, random.Random(0))))
    assert found[:, 0].min() >= 4 and found[:, 0].max() <= 1024 and found.sum(1).max() <= 2048
    draw = np.random.default_rng(0)
    sigmas = np.array(datasets.SHAREGPT_SIGMAS)
    drawn = np.exp(draw.normal(np.log(datasets.SHAREGPT_MEANS) - sigmas**2 / 2, sigmas, (100_000, 2)))
    # before the filter, the means are ShareGPT's
    np.testing.assert_allclose(drawn.mean(0), datasets.SHAREGPT_MEANS, rtol=0.03)
    kept = drawn[(drawn.min(1) >= 4) & (drawn[:, 0] <= 1024) & (drawn.sum(1) <= 2048)]
    np.testing.assert_allclose(np.median(found, 0), np.median(kept, 0), rtol=0.08)
    np.testing.assert_allclose(found.mean(0), kept.mean(0), rtol=0.08)


def test_prefixes_are_shared():
    requests = datasets.prefix_repetition(
        IDS, 11, random.Random(1), num_prefixes=3, prefix_len=20, suffix_len=5, output_len=7
    )
    assert lengths(requests) == [(25, 7)] * 9
    prefixes = [request.prompt_token_ids[:20] for request in requests]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [3, 3, 3]
    assert len({request.prompt_token_ids for request in requests}) == 9


def test_sharegpt_files(tmp_path: Path):
    def entry(*turns: str) -> dict[str, Any]:
        return {"conversations": [{"from": "x", "value": turn} for turn in turns]}

    words = "a bb ccc dddd e"
    entries = [
        entry(words, words + " f", "more"),
        entry(words),  # nobody answers
        entry("too short", words),
        entry(words, "too short"),
        entry("w " * 1025, words),
        entry("w " * 1000, "w " * 1049),
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    requests = read("--dataset-name", "sharegpt", "--dataset-path", str(path))
    assert requests == [BenchRequest(prompt_token_ids=(1, 2, 3, 4, 1), output_len=6)] * 6
    # an output length of one's own lets short answers in
    requests = read("--dataset-name", "sharegpt", "--dataset-path", str(path), "--output-len", "9")
    assert set(lengths(requests)) == {(5, 9), (1000, 9)}


def test_files_of_prompts(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a bb", "output_tokens": 3}\n\n{"prompt": [5, 6, 7]}\n')
    requests = read("--dataset-name", "custom", "--dataset-path", str(path))
    assert [request.prompt_token_ids for request in requests] == [(1, 2), (5, 6, 7)] * 3
    assert lengths(requests)[:2] == [(2, 3), (3, datasets.CUSTOM_OUTPUT_LEN)]
    # a trace is not repeated: its times belong to its lines
    path.write_text('{"prompt": "a", "timestamp": 4}\n{"prompt": "b", "timestamp": 5.5}\n')
    requests = read("--dataset-name", "custom", "--dataset-path", str(path), "--output-len", "2")
    assert [(request.arrival_s, request.output_len) for request in requests] == [(4, 2), (5.5, 2)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset-name", "sharegpt"], "sharegpt_like, which needs no file"),
        (["--dataset-name", "custom"], "give --dataset-path"),
        (["--dataset-path", "x"], "reads no --dataset-path"),
        (["--dataset-name", "sharegpt_like", "--input-len", "3"], "lengths of its own"),
        (["--random-range-ratio", "1"], r"must be in \[0, 1\), got 1"),
        (["--dataset-name", "prefix_repetition"], r"--num-prompts \(6\) must be at least .* \(10, at least 1\)"),
        (
            ["--dataset-name", "sharegpt", "--dataset-path", "nowhere"],
            "nowhere cannot be read: No such file",
        ),
        (["--dataset-name", "custom", "--dataset-path", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_refusals(argv: list[str], message: str):
    with pytest.raises(ValidationError, match=message):
        read(*argv)


def test_a_broken_line_is_named(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n{"prompt": "not')
    with pytest.raises(ValidationError, match="line 3, is not JSON: Unterminated string .*, column 12"):
        read("--dataset-name", "custom", "--dataset-path", str(path))
    path.write_bytes(b'{"prompt": "fine"}\n\xff')
    with pytest.raises(ValidationError, match="cannot be read as lines of JSON, behind line 0: 'utf-8' codec"):
        read("--dataset-name", "custom", "--dataset-path", str(path))


@pytest.mark.parametrize("value", [5, ["a", "b"], None])
def test_conversations_are_texts(tmp_path: Path, value: object):
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([{"conversations": [{"value": "a bb a bb"}, {"value": value}]}]))
    with pytest.raises(ValidationError, match="is not ShareGPT's JSON.*a value is not a text"):
        read("--dataset-name", "sharegpt", "--dataset-path", str(path))


def test_prompts_that_prefixes_leave_over_are_counted(caplog: pytest.LogCaptureFixture):
    requests = read("--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "4")
    assert len(requests) == 4 and "4 of 6 prompts: each of 4 prefixes" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "7",
        "{}",
        '{"prompt": ""}',
        '{"prompt": ["a"]}',
        '{"prompt": "a", "output_tokens": 0}',
        '{"prompt": []}',
        '{"prompt": "a", "timestamp": NaN}',
    ],
)
def test_lines_without_a_prompt_are_refused(tmp_path: Path, line: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValidationError, match="line 2: expected"):
        read("--dataset-name", "custom", "--dataset-path", str(path))
