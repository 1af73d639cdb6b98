"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tiny_model`'s checkpoint."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[LLM]:
    """A small engine, one for each file."""
    with LLM(tiny_model, **SMALL) as llm:
        yield llm
