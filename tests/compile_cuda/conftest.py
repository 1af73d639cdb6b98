"""Compiles once for all tests, and shows the table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import table
from .compiling import QUICK, Results, compile_everywhere, toolchains

_KEY = pytest.StashKey[dict[tuple[str, str], Results]]()


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], Results]:
    """(version of JAX, target) -> what came out, of all configurations, or of some with ``COMPILE_CUDA_QUICK=1``."""
    if not toolchains():
        pytest.skip("`make compile-cuda` installs the compiler")
    results = compile_everywhere(quick=QUICK)
    request.config.stash[_KEY] = results
    return results


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_KEY, None)
    if results is not None:
        terminalreporter.section("compiled for GPUs that are not here")
        for line in table.lines(results):
            terminalreporter.write_line(line)
