"""How much of a GPU JAX may have: nearly all, unless somebody has decided that already."""

from __future__ import annotations

import os

import pytest

from jaxllm.runner.memory.gpu_memory import share_gpu_memory

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@pytest.fixture(autouse=True)
def nothing_is_said(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        # set first, so that what is set later is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("utilization", "before", "after"),
    [
        (0.9, {}, {NAMES[0]: "0.95"}),
        (0.3, {}, {NAMES[0]: "0.95", NAMES[2]: "false"}),
        (0.3, {NAMES[2]: "true"}, {NAMES[0]: "0.95", NAMES[2]: "true"}),
        (0.3, {NAMES[0]: "0.5"}, {NAMES[0]: "0.5"}),
        # jaxlib refuses both names at once
        (0.9, {NAMES[1]: ".4"}, {NAMES[1]: ".4"}),
    ],
)
def test_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, utilization: float, before: dict[str, str], after: dict[str, str]
):
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    share_gpu_memory(utilization)
    share_gpu_memory(utilization)
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == after


def test_jaxlib_reads_it():
    """By its own function, which builds the options of a GPU's client."""
    from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

    share_gpu_memory(0.9)
    options = generate_pjrt_gpu_plugin_options()
    assert options["memory_fraction"] == 0.95 and "preallocate" not in options
