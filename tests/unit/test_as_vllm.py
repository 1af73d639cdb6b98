"""vLLM's names for jaxllm's classes, in processes of their own: nothing of it may be left in this one."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxllm.as_vllm as as_vllm
from jaxllm import aliases
from jaxllm.aliases import MODULES, REST, Missing


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
            for name, home in homes.items():
                if not isinstance(home, Missing):
                    assert getattr(module, name) is not None, f"{module.__name__}.{name}"


@pytest.mark.parametrize("package", ["vllm", "jaxllm"])
def test_a_name_without_meaning_says_why(package: str):
    as_vllm.install()
    for path, homes in MODULES.items():
        module = importlib.import_module(f"{package}.{path}" if path else package)
        for name, home in homes.items():
            if isinstance(home, Missing):
                name = "Anything" if name == REST else name
                why = re.escape(f"jaxllm has no {module.__name__}.{name}; {home}")
                with pytest.raises(AttributeError, match=why):
                    getattr(module, name)
                with pytest.raises(ImportError, match=why):
                    exec(f"from {module.__name__} import {name}")
                assert not hasattr(module, name)
                assert "\n" not in home


#: what vLLM 0.33's offline text examples and its documentation of `LLM` import
IMPORTS = """
vllm LLM EngineArgs SamplingParams LLMEngine RequestOutput PoolingParams AsyncEngineArgs AsyncLLMEngine TokensPrompt
vllm.config PoolerConfig ProfilerConfig StructuredOutputsConfig
vllm.config.pooler PoolerConfig
vllm.distributed cleanup_dist_env_and_memory
vllm.engine.arg_utils AsyncEngineArgs EngineArgs
vllm.engine.async_llm_engine AsyncLLMEngine
vllm.entrypoints.llm LLM
vllm.inputs TextPrompt TokensPrompt
vllm.logger init_logger
vllm.outputs RequestOutput PoolingRequestOutput
vllm.platforms current_platform
vllm.pooling_params PoolingParams
vllm.sampling_params BeamSearchParams RequestOutputKind SamplingParams StructuredOutputsParams
vllm.utils.argparse_utils FlexibleArgumentParser
vllm.utils.print_utils print_embeddings
vllm.v1.engine.async_llm AsyncLLM
vllm.v1.metrics.reader Counter Gauge Histogram Vector
"""


def test_what_vllms_examples_import_is_there():
    for line in IMPORTS.strip().splitlines():
        module, *names = line.split()
        path = module.partition(".")[2]
        for name in names:
            assert name in aliases.names(path), f"{module}.{name}"


def test_the_platform_is_jaxs():
    import jax

    platform = importlib.import_module("jaxllm.platforms").current_platform
    assert (platform.is_cpu(), platform.is_cuda(), platform.is_rocm()) == (True, False, False)
    assert (platform.device_type, platform.device_name, platform.device_count()) == ("cpu", "cpu", jax.device_count())
    assert platform.get_device_name() == jax.devices()[0].device_kind


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
    assert second.startswith(
        "jaxllm has no vllm.config.ModelConfig; of this module it has: PoolerConfig, ProfilerConfig,"
    )


def test_the_real_one_is_not_replaced(tmp_path: Path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = "import vllm\nimport jaxllm.as_vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "vllm itself has been imported already" in done.stderr
