"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from support.quick_compile import THOROUGH
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM
from jaxllm.runner.compile.programs import CPU_OPTIONS


@pytest.fixture(scope="module", autouse=True)
def program_store() -> Iterator[None]:
    """Engines, and those of processes that a test starts, keep their programs as a user's do, and find them again
    without tracing them. JAX's own compile cache, which the other tests use, would have them traced at each start.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        folder = jax.config.values["jax_compilation_cache_dir"]
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


#: files that hold numbers against each other bit for bit, or that run real weights for long: they compile as users do
COMPILED_FULLY = ("test_bad_input", "test_deterministic")


@pytest.fixture(scope="module", autouse=True)
def compiles_thoroughly(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem in COMPILED_FULLY:
            for name, value in THOROUGH.items():
                patch.setitem(CPU_OPTIONS, name, value)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tiny_model`'s checkpoint."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[LLM]:
    """A small engine, one for each file."""
    with LLM(tiny_model, **SMALL) as llm:
        yield llm
