"""One engine and one server for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.serving import served
from support.tiny_model import SMALL

from jaxllm import AsyncLLM


@pytest.fixture(scope="package")
def engine(tiny_model: Path) -> Iterator[AsyncLLM]:
    # a model that knows nothing likes to write spaces
    engine = AsyncLLM(tiny_model, **SMALL, structured_outputs_config={"disable_any_whitespace": True})
    yield engine
    engine.shutdown()


@pytest.fixture(scope="package")
def url(engine: AsyncLLM) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="package")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
