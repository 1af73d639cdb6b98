"""Records what each test of the kernel suites says, as soon as it says it. A pytest plugin."""

from __future__ import annotations

import collections
import os
import time

import pytest

from gpu_check import records

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_counts: collections.Counter[str] = collections.Counter()
_start = _told = time.monotonic()
#: seconds after which the counts are recorded again, in case that the stage's time ends before the tests do
_PATIENCE = 5.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A rehearsal runs one test of each suite; the suites themselves are part of `make test`."""
    if records.is_rehearsal():
        first = {item.path: item for item in reversed(items)}
        items[:] = [item for item in items if first[item.path] is item]


def pytest_sessionstart(session: pytest.Session) -> None:
    import jax

    if not _IS_WORKER and getattr(session.config.option, "numprocesses", None):
        return
    # what the suites' conftest asks, too
    assert records.is_rehearsal() or jax.default_backend() == "gpu", "the suites would run in the interpreter"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _told
    if _IS_WORKER:
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
        if report.outcome == "failed":
            records.check(report.nodeid, False, str(report.longrepr)[-2000:])
    if time.monotonic() > _told + _PATIENCE:
        _told = time.monotonic()
        _record_counts("tests so far")


def _record_counts(name: str) -> None:
    records.fact(name, {**_counts, "seconds": round(time.monotonic() - _start, 1)})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _IS_WORKER:
        _record_counts("tests")
        records.check("tests ran", _counts["passed"] > 0, ", ".join(f"{n} {what}" for what, n in _counts.items()))
