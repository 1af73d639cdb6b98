"""What a file's encoding is taken for, against Python's own encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.encodings import encoding_of, likely_encoding

WESTERN = "Où est la gare, s'il vous plaît? In München, Größe 5.\n" * 3


@pytest.mark.parametrize(
    ("text", "encoding", "likely"),
    [
        (WESTERN, "latin-1", "latin-1"),
        ("He said “no” – and left for 5 €.\n", "cp1252", "cp1252"),
        (WESTERN, "utf-16", "utf-16"),
        (WESTERN, "utf-16-le", "utf-16-le"),
        (WESTERN, "utf-16-be", "utf-16-be"),
        # nothing tells it from other alphabets of one byte a letter
        ("Где находится вокзал?\n", "cp1251", None),
    ],
)
def test_what_a_text_is_likely_to_be(text: str, encoding: str, likely: str | None):
    found = likely_encoding(text.encode(encoding))
    assert found == likely
    if found is not None:
        assert text.encode(encoding).decode(found) == text


def test_the_place_of_the_first_wrong_byte_is_told(tmp_path: Path):
    file = tmp_path / "in.csv"
    # beyond the first MiB, at whose end a letter of two bytes is cut
    lines = [b"y" * 62, *(("x" * 62 + "é").encode() for _ in range(20_000))]
    assert b"\n".join(lines)[2**20 - 1 : 2**20 + 1] == "é".encode()
    file.write_bytes(b"\n".join([*lines, b"caf\xe9", b"last"]))
    with pytest.raises(ValidationError, match="line 20002 has the byte 0xE9"):
        encoding_of(str(file), None)
    with pytest.raises(ValidationError, match="is not ascii: line 2 has the byte 0xC3"):
        encoding_of(str(file), "ascii")
    # broken lines are refused one by one then
    assert encoding_of(str(file), "UTF8") == encoding_of(str(tmp_path / "none"), None) == "utf-8-sig"
    for wrong in ("latin-nope", "rot13"):
        with pytest.raises(ValidationError, match=f"--encoding {wrong} is no text encoding"):
            encoding_of(str(file), wrong)


def test_a_file_that_ends_within_a_character(tmp_path: Path):
    (tmp_path / "in.txt").write_bytes("one\ntwo é".encode()[:-1])
    with pytest.raises(ValidationError, match="line 2 has the byte 0xC3"):
        encoding_of(str(tmp_path / "in.txt"), None)
