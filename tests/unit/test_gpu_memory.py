"""How much of a GPU JAX may have: nearly all, unless somebody has decided that already."""

from __future__ import annotations

import os

import pytest

from jaxllm.runner.gpu_memory import share_gpu_memory

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {NAMES[0]: "0.95", NAMES[2]: "false"}),
        ({NAMES[2]: "true"}, {NAMES[0]: "0.95", NAMES[2]: "true"}),
        ({NAMES[0]: "0.5"}, {NAMES[0]: "0.5"}),
        # jaxlib refuses both names at once
        ({NAMES[1]: ".4"}, {NAMES[1]: ".4"}),
    ],
)
def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    share_gpu_memory()
    share_gpu_memory()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == after


def test_jaxlib_reads_it(monkeypatch: pytest.MonkeyPatch):
    """By its own function, which builds the options of a GPU's client."""
    from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    share_gpu_memory()
    options = generate_pjrt_gpu_plugin_options()
    assert options["memory_fraction"] == 0.95 and options["preallocate"] is False
