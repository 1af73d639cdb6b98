"""A GGUF header is kept for who asks for it next, and never after the file has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import hf_weights, write_gguf

from jaxllm.weights.formats import gguf as gguf_module
from jaxllm.weights.formats.gguf import GGUFReader, read_metadata
from jaxllm.weights.formats.gguf_header import parse_header


def test_a_header_is_parsed_once_unless_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parsed: list[Path] = []

    def parse(data: memoryview, path: Path) -> Any:
        parsed.append(path)
        return parse_header(data, path)

    monkeypatch.setattr(gguf_module, "parse_header", parse)
    path = tmp_path / "model.gguf"
    good = write_gguf(tmp_path / "good.gguf", "llama", hf_weights("llama")).read_bytes()

    def write(content: bytes, age: float) -> None:
        path.write_bytes(content)
        then = time.time() - age
        os.utime(path, (then, then))

    def read() -> int:
        with GGUFReader(path) as reader:
            reader.config()
        read_metadata(path)
        return len(parsed)

    write(good, 100)
    assert read() == 1
    write(good, 50)
    assert read() == 2
    gguf_module.forget_headers()
    assert read() == 3
    # one that has just been written may be written again within the clock's resolution
    write(good, 0)
    assert read() == 5
