"""vLLM's names for jaxllm's classes, in processes of their own: nothing of it may be left in this one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxllm.as_vllm as as_vllm
from jaxllm.aliases import MODULES


@pytest.fixture(autouse=True)
def undo():
    yield
    for path in MODULES:
        sys.modules.pop(f"vllm.{path}" if path else "vllm", None)


def test_every_name_exists():
    as_vllm.install()
    for path, homes in MODULES.items():
        for package in ("vllm", "jaxllm"):
            module = importlib.import_module(f"{package}.{path}" if path else package)
            for name in homes:
                assert getattr(module, name) is not None, f"{module.__name__}.{name}"


def test_vllm_paths_with_only_the_package_renamed():
    code = (
        "from jaxllm.sampling_params import BeamSearchParams\n"
        "from jaxllm.engine.arg_utils import AsyncEngineArgs\n"
        "from jaxllm import AsyncLLMEngine, EngineArgs\n"
        "import jaxllm.v1.metrics.reader as reader\n"
        "from jaxllm.config import PoolerConfig\n"
        "assert AsyncEngineArgs is EngineArgs and AsyncLLMEngine.__name__ == 'AsyncLLM' and reader.Counter\n"
        "try:\n"
        "    from jaxllm.outputs import Nothing\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("jaxllm has no jaxllm.outputs.Nothing; of this module it has: CompletionOutput, ")


def test_a_script_runs_unchanged(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from vllm import LLM, SamplingParams\n"
        "from vllm.sampling_params import StructuredOutputsParams\n"
        "import vllm.v1.metrics.reader\n"
        "assert __name__ == '__main__'\n"
        "print(LLM.__module__, SamplingParams(max_tokens=3).max_tokens, vllm.__version__, sys.argv[1:])\n"
        "try:\n"
        "    from vllm.config import ModelConfig\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.as_vllm", script, "--flag", "x"], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("jaxllm.llm 3 ") and first.endswith(" ['--flag', 'x']")
    assert (
        second == "jaxllm has no vllm.config.ModelConfig; of this module it has: PoolerConfig, StructuredOutputsConfig"
    )


def test_the_real_one_is_not_replaced(tmp_path: Path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = "import vllm\nimport jaxllm.as_vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "vllm itself has been imported already" in done.stderr
