"""Compiles once for all tests, beside those that have programs of their own, and shows the table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from . import table
from .compiling import QUICK, Results, compile_everywhere, toolchains

_KEY = pytest.StashKey[dict[tuple[str, str], Results]]()


@pytest.fixture(scope="session", autouse=True)
def compiling(request: pytest.FixtureRequest) -> Iterator[Future[dict[tuple[str, str], Results]] | None]:
    """What `compiled` waits for: it has begun when the first test does."""
    asked = any("compiled" in getattr(item, "fixturenames", ()) for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(compile_everywhere, quick=QUICK) if asked and toolchains() else None


@pytest.fixture(scope="session")
def compiled(
    request: pytest.FixtureRequest, compiling: Future[dict[tuple[str, str], Results]] | None
) -> dict[tuple[str, str], Results]:
    """(version of JAX, target) -> what came out, of all configurations, or of some with ``COMPILE_CUDA_QUICK=1``."""
    if compiling is None:
        pytest.skip("`make compile-cuda` installs the compiler")
    results = compiling.result()
    request.config.stash[_KEY] = results
    return results


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
    # those that wait come last
    items.sort(key=lambda item: "compiled" in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_KEY, None)
    if results is not None:
        terminalreporter.section("compiled for GPUs that are not here")
        for line in table.lines(results):
            terminalreporter.write_line(line)
