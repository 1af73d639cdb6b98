"""Fixtures that every test may use: real weights, fetched once into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.weights import fetch


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the embedded default model."""
    return fetch.fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def qwen25_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct."""
    return fetch.fetch("qwen2.5-coder-0.5b-instruct")
