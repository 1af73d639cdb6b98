"""The file of a batch's results: whole lines, once each, whatever ended the run before."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.entrypoints.batch.digests import DigestSet
from jaxllm.entrypoints.batch.journal import DUPLICATE, INVALID_LINE, Journal


def result(custom_id: str | None, text: str = "", error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": {"text": text}}, "error": error}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_a_file_cut_at_any_byte_of_its_last_two_lines_is_taken_up(tmp_path: Path):
    """What is left are the whole lines; they are finished, and the others are not."""
    path = tmp_path / "out.jsonl"
    with Journal(str(path)) as journal:
        for number in range(1, 6):
            journal.write(number, result(f"request-{number}", "é 漢\u2028 \n" * number))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[2], len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(str(path), resume=True) as journal:
            assert [journal.is_finished(f"request-{n}") for n in range(1, 6)] == [n <= kept for n in range(1, 6)]
            assert journal.num_finished == kept
            for number in range(kept + 1, 6):
                journal.write(number, result(f"request-{number}", "é 漢\u2028 \n" * number))
        assert path.read_bytes() == whole


def test_a_file_that_is_there_is_neither_overwritten_nor_continued_unasked(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.write_text("")  # what mktemp makes is no result
    with Journal(str(path)) as journal:
        journal.write(1, result("a"))
    before = path.read_bytes()
    with pytest.raises(ValidationError, match="exists. --resume finishes what it lacks, --overwrite begins anew"):
        Journal(str(path))
    with pytest.raises(ValidationError, match="not both"):
        Journal(str(path), resume=True, overwrite=True)
    assert path.read_bytes() == before
    with Journal(str(path), overwrite=True) as journal:
        assert not journal.is_finished("a")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", ["hello", "[1]", '{"id": 1}', '{"id": "x", "custom_id": 5}', "\0\0"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, line: str):
    path = tmp_path / "out.jsonl"
    good = '{"id": "batch_req_1", "custom_id": "a", "error": null}\n'
    # before results, behind them, alone, and without a newline
    for text in (f"{line}\n{good}", f"{good}{line}\n", f"{line}\n", line):
        path.write_text(text)
        before = path.read_bytes()
        with pytest.raises(ValidationError, match="Line [12] of .* is not a result of run-batch"):
            Journal(str(path), resume=True)
        assert path.read_bytes() == before


def test_lines_without_an_id_of_their_own_are_known_by_their_number(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    with Journal(str(path)) as journal:
        journal.write(1, result("a"))
        journal.write(2, result(None, error={"code": INVALID_LINE, "message": "no"}))
        journal.write(3, result("a", error={"code": DUPLICATE, "message": "again"}))
        journal.write(4, result("b", error={"code": "400", "message": "no"}))
    with Journal(str(path), resume=True) as journal:
        assert [journal.is_refused(number) for number in range(1, 5)] == [False, True, True, False]
        assert journal.is_finished("a") and journal.is_finished("b")
        assert (journal.num_finished, journal.num_failed) == (4, 3)


def test_a_second_process_is_kept_out(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    code = "import sys; from jaxllm.entrypoints.batch.journal import Journal; Journal(sys.argv[1], overwrite=True)"
    with Journal(str(path)) as journal:
        journal.write(1, result("a"))
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "Another process is writing" in other.stderr
    assert [line["custom_id"] for line in lines(path)] == ["a"]


def test_a_full_disk_is_told(tmp_path: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(JaxLLMError, match="could not be written: No space left"):
        with Journal("/dev/full", overwrite=True) as journal:
            journal.write(1, result("a"))


def test_lone_surrogates_are_escaped(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    with Journal(str(path)) as journal:
        journal.write(1, result("\ud800", "\udc00"))
    (line,) = lines(path)
    assert line["custom_id"] == "\ud800"
    with Journal(str(path), resume=True) as journal:
        assert journal.is_finished("\ud800")


@given(st.lists(st.text(st.characters(codec=None), max_size=4)))
def test_digests_are_a_set(texts: list[str]):
    ours, theirs = DigestSet(), set()
    for text in texts:
        assert ours.add(text) == (text not in theirs)
        theirs.add(text)
        assert text in ours
    assert len(ours) == len(theirs)


def test_digests_grow_and_stay_small():
    dice = random.Random(0)
    names = [f"request-{dice.getrandbits(64)}" for _ in range(20_000)]
    digests = DigestSet()
    assert all(digests.add(name) for name in names)
    assert all(name in digests for name in names)
    assert not any(f"other-{i}" in digests for i in range(20_000))
    assert digests.nbytes <= 24 * len(names)
