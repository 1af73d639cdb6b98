"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM
from jaxllm.runner.heads.sampling_programs import SamplingPrograms


@pytest.fixture(scope="module", autouse=True)
def program_store() -> Iterator[None]:
    """Engines, and those of processes that a test starts, keep their programs as a user's do, and find them again
    without tracing them. JAX's own compile cache, which the other tests use, would have them traced at each start.
    All programs are there before the first step: what a test compares does not depend on when one is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingPrograms, "_begins_early", False)
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        folder = jax.config.values["jax_compilation_cache_dir"]
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tiny_model`'s checkpoint."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[LLM]:
    """A small engine, one for each file."""
    with LLM(tiny_model, **SMALL) as llm:
        yield llm
