"""What comes to a simulated engine: files of lengths and times, prompts that begin alike, the shapes of datasets."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from support.tiny_model import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxllm.api.errors import ValidationError
from jaxllm.bench.workload_options import add_workload_options, workload_of
from jaxllm.tuning.simulation.workload import Workload, WorkloadRequest
from jaxllm.tuning.simulation.workload_file import read_workload

#: three lines as Mooncake's traces have them (FAST25-release/traces/conversation_trace.jsonl)
MOONCAKE = [
    {"timestamp": 3000, "input_length": 1400, "output_length": 30, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 7]},
    {"timestamp": 4500, "input_length": 512, "output_length": 9, "hash_ids": [5]},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workload_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_blocks_are_shared_where_all_tokens_up_to_their_ends_are_the_same(block_size: int):
    draw = random.Random(0)
    base = draw.choices(range(50), k=150)
    prompts = [[*base[: draw.randint(0, 150)], *draw.choices(range(50), k=draw.randint(1, 90))] for _ in range(12)]
    workload = Workload.of_prompts(prompts, [4] * 12)
    hashes = workload.block_hashes(block_size)
    for one, other in itertools.product(range(12), repeat=2):
        assert len(hashes[one]) == len(prompts[one]) // block_size
        for block in range(min(len(hashes[one]), len(hashes[other]))):
            end = (block + 1) * block_size
            same = prompts[one][:end] == prompts[other][:end]
            assert (hashes[one][block] == hashes[other][block]) == same
    seen: list[list[int]] = []
    shared = 0
    for prompt in prompts:
        most = max(
            (sum(1 for _ in itertools.takewhile(bool, map(int.__eq__, prompt, each))) for each in seen), default=0
        )
        shared += most // 8 * 8
        seen.append(prompt)
    assert workload.shared == shared / sum(map(len, prompts))


def test_a_trace_of_mooncake(tmp_path: Path):
    workload = read_workload(write(tmp_path / "trace.jsonl", MOONCAKE))
    assert [(r.arrival, r.num_prompt_tokens, r.num_output_tokens) for r in workload.requests] == [
        (0.0, 1100, 500),
        (3.0, 1400, 30),
        (4.5, 512, 9),
    ]
    assert workload.piece_size == 512 and workload.shared == 1024 / 3012 and workload.longest == 1600
    first, second, third = workload.block_hashes(16)
    assert first[:64] == second[:64] and first[64] != second[64] and not set(third) & set(first)
    assert str(workload).startswith("3 requests in 4.5 s, 3,012 prompt tokens (34% of them shared), 539 output tokens")
    twice = workload.at_rate(2)
    assert [request.arrival for request in twice.requests] == [0.0, 1.5, 2.25]


def test_seconds_and_token_ids(tmp_path: Path):
    rows = [
        {"prompt": list(range(20)), "output_tokens": 3, "timestamp": 0.5},
        {"prompt": list(range(24)), "output_tokens": 4, "timestamp": 2},
    ]
    workload = read_workload(write(tmp_path / "w.jsonl", rows))
    assert [request.arrival for request in workload.requests] == [0.0, 1.5]
    assert workload.shared == 16 / 44
    assert read_workload(tmp_path / "w.jsonl", time_unit="ms").seconds == pytest.approx(1.5e-3)
    rows = [
        {"prompt_tokens": 5, "output_tokens": 6, "arrival_s": 0},
        {"input_length": 7, "output_length": 8, "arrival_s": 2},
    ]
    assert read_workload(write(tmp_path / "w.jsonl", rows)).seconds == 2.0


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([{}, {"arrival_s": 2}, {}], 'line 1: there is no "arrival_s", which line 2 has (2 of 3 lines have none)'),
        ([{"arrival_s": 0}, {"arrival_s": None}], 'line 2: there is no "arrival_s", which line 1 has (1 of 2'),
        ([{"timestamp": 0}, {"arrival_s": 1}], 'line 2: there is no "timestamp", which line 1 has (1 of 2'),
    ],
)
def test_lines_without_the_others_time_are_refused(tmp_path: Path, times: list[dict[str, object]], message: str):
    path = write(tmp_path / "w.jsonl", [{"input_length": 5, "output_length": 6, **time} for time in times])
    with pytest.raises(ValidationError, match=re.escape(message)):
        read_workload(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_length": 5}, r"line 2: expected .*output_length.*above 0"),
        ({"input_length": 0, "output_length": 5}, "line 2: expected"),
        ({"input_length": 5, "output_length": 5, "timestamp": "now"}, 'line 2: "timestamp" is a number'),
        ({"input_length": 5, "output_length": 5}, 'line 2: there is no "timestamp", which line 1 has'),
        ({"input_length": 5, "output_length": 5, "timestamp": 1, "hash_ids": 3}, '"hash_ids" is a list'),
        ({"input_length": 99, "output_length": 5, "timestamp": 1, "hash_ids": [1] * 50}, "--hash-block-size"),
        ([1], "line 2: expected"),
        ({"prompt": ["Hello"], "output_length": 5}, 'line 2: "prompt" is a list of token ids'),
        ({"prompt": "Hello", "output_length": 5}, "line 2: expected"),
        ({"input_length": 5, "output_length": 5, "timestamp": math.nan}, 'line 2: "timestamp" is a number'),
    ],
)
def test_lines_that_are_wrong_say_so(tmp_path: Path, row: object, message: str):
    path = write(tmp_path / "w.jsonl", [{"timestamp": 3, "input_length": 4, "output_length": 3}, row])
    with pytest.raises(ValidationError, match=message):
        read_workload(path)
    with pytest.raises(ValidationError, match="cannot be read"):
        read_workload(tmp_path / "none.jsonl")
    with pytest.raises(ValidationError, match="there are no requests"):
        read_workload(write(tmp_path / "empty.jsonl", []))


def test_files_of_other_forms(tmp_path: Path):
    """Packed ones, those with a mark of their encoding, and those whose names say that they are traces."""
    text = write(tmp_path / "w.jsonl", MOONCAKE).read_bytes()
    found = read_workload(tmp_path / "w.jsonl")
    (tmp_path / "w.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    for name in ("w.jsonl.gz", "marked.jsonl"):
        assert read_workload(tmp_path / name).requests == found.requests
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(ValidationError, match="cut.jsonl.gz cannot be read"):
        read_workload(tmp_path / "cut.jsonl.gz")
    (tmp_path / "w.json").write_bytes(text)
    with pytest.raises(ValidationError, match="is not a trace .*Lines of JSON are in a file of another name"):
        read_workload(tmp_path / "w.json")
    with pytest.raises(ValidationError, match="cannot be read: Is a directory"):
        read_workload(tmp_path)
    (tmp_path / "large.jsonl").write_text(f'{{"timestamp": 1{"0" * 400}, "input_length": 1, "output_length": 1}}')
    with pytest.raises(ValidationError, match='line 1: "timestamp" is a number'):
        read_workload(tmp_path / "large.jsonl")


def test_a_datasets_shape_comes_at_a_rate(tmp_path: Path):
    workload = workload_of(options("--num-prompts", "400", "--request-rate", "20", "--input-len", "64"))
    assert {r.num_prompt_tokens for r in workload.requests} == {64} and len(workload) == 400
    assert workload.seconds == pytest.approx(20, rel=0.2) and workload.shared == 0
    shared = options("--dataset-name", "prefix_repetition", "--num-prompts", "40", "--max-concurrency", "4")
    found = workload_of(shared)
    assert found.shared == pytest.approx(30 / 40 * 256 / 512, abs=0.01) and found.seconds == 0
    assert found.max_concurrency == 4
    lengths = workload_of(options("--dataset-name", "sharegpt_like", "--num-prompts", "300"))
    assert 80 < lengths.num_prompt_tokens / 300 < 240
    path = str(write(tmp_path / "trace.jsonl", MOONCAKE))
    assert workload_of(options("--workload", path, "--request-rate", "4")).seconds == 0.5
    assert len(workload_of(options("--workload", path, "--num-prompts", "2"))) == 2
    with pytest.raises(ValidationError, match="--input-len is for datasets"):
        workload_of(options("--workload", path, "--input-len", "2"))
    with pytest.raises(ValidationError, match="--burstiness is for datasets: .* requests of its own"):
        workload_of(options("--workload", path, "--burstiness", "0.5", "--request-rate", "4"))
    with pytest.raises(ValidationError, match="--dataset-name is for datasets"):
        workload_of(options("--workload", path, "--dataset-name", "sharegpt_like"))
    for words in (["--workload", "trace.json"], []):
        with pytest.raises(ValidationError, match="--time-unit is for a --workload of lines of JSON"):
            workload_of(options(*words, "--time-unit", "s"))
    with pytest.raises(ValidationError, match="pictures, which are not simulated"):
        workload_of(options("--dataset-name", "random-mm"))
    with pytest.raises(ValidationError, match="above 0"):
        workload_of(options("--request-rate", "0"))
    once = [{"input_length": 4, "output_length": 3}]
    with pytest.raises(ValidationError, match="come at once"):
        workload_of(options("--workload", str(write(tmp_path / "once.jsonl", once)), "--request-rate", "3"))


def test_a_file_of_prompts_needs_its_tokenizer_alone(tmp_path: Path):
    """The model may be a config.json, as for a device that is not there, or nobody's: steps may be another trace's."""
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(tmp_path)
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "abc", "output_tokens": 2}, {"prompt": "de"}])
    words = ["--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "2", "--output-len", "3"]
    arguments = options(*words)
    arguments.tokenizer, arguments.config = str(tmp_path), None
    for model in (str(write(tmp_path / "config.json", [{"vocab_size": 300}])), "no/model-of-this-name"):
        arguments.model = model
        assert len(workload_of(arguments)) == 2


def test_requests_are_in_the_order_of_their_arrival():
    late, early = (WorkloadRequest(arrival=t, num_prompt_tokens=1, num_output_tokens=1) for t in (2.0, 1.0))
    assert Workload(requests=(late, early)).requests == (early, late)
