"""Importing jaxllm and asking the command for help load nothing heavy. Each check runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jaxllm

HEAVY = ("jax", "jaxlib", "numpy", "transformers", "tokenizers", "huggingface_hub", "torch", "tqdm")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import jaxllm",
        "from jaxllm import SamplingParams; SamplingParams(temperature=0.5)",
        "from jaxllm import RequestOutput, CompletionOutput",
        "import jaxllm.weights.fetch",
        "from jaxllm.entrypoints.cli import build_parser; build_parser().format_help()",
    ],
)
def test_nothing_heavy_is_imported(code: str):
    loaded = run(f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.split() == []


def test_the_engine_imports_no_jax():
    code = (
        "import importlib, pkgutil, sys, jaxllm.engine\n"
        "for module in pkgutil.walk_packages(jaxllm.engine.__path__, 'jaxllm.engine.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*[name for name in ('jax', 'jaxlib') if name in sys.modules])"
    )
    assert run(code).split() == []


def test_importing_the_facade_touches_no_device():
    code = (
        "from jaxllm import LLM\n"
        "import sys\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print(len(bridge._backends) if bridge else 0)"
    )
    assert run(code).strip() == "0"


def test_public_names_are_what_they_say():
    from jaxllm.api.outputs import CompletionOutput, RequestOutput
    from jaxllm.api.sampling_params import SamplingParams

    assert jaxllm.SamplingParams is SamplingParams
    assert jaxllm.RequestOutput is RequestOutput and jaxllm.CompletionOutput is CompletionOutput
    assert set(jaxllm.__all__) <= set(dir(jaxllm))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = jaxllm.Nothing  # pyright: ignore[reportAttributeAccessIssue]
