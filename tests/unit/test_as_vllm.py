"""vLLM's names for jaxllm's classes. What runs scripts does so in processes of their own."""

from __future__ import annotations

import importlib
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model

import jaxllm.as_vllm as as_vllm
from jaxllm.aliases import MODULES, REST, AliasFinder, Missing

#: "module name name ...": what vLLM 0.33's examples, offline and not, and the Python of its documentation import
IMPORTS = (Path(__file__).parents[1] / "data" / "vllm_imports.txt").read_text().splitlines()


@pytest.fixture(autouse=True)
def undo():
    """Nothing of vllm is left in this process."""
    as_vllm.install()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not (isinstance(f, AliasFinder) and f.package == "vllm")]


@pytest.mark.parametrize("package", ["vllm", "jaxllm"])
def test_every_name_exists_or_says_why_not(package: str):
    for path, homes in MODULES.items():
        module = importlib.import_module(f"{package}.{path}" if path else package)
        for name, home in homes.items():
            if not isinstance(home, Missing):
                assert getattr(module, name) is not None, f"{module.__name__}.{name}"
                continue
            name = "Anything" if name == REST else name
            with pytest.raises(ImportError, match=re.escape(f"jaxllm has no {module.__name__}.{name}; {home}")):
                exec(f"from {module.__name__} import {name}")
            assert not hasattr(module, name)
            assert "\n" not in home


@pytest.mark.parametrize("package", ["vllm", "jaxllm"])
def test_what_vllms_examples_import(package: str):
    for line in IMPORTS:
        path, *names = line.split()
        path = path.partition(".")[2]
        module = f"{package}.{path}" if path else package
        for name in names:
            try:
                exec(f"from {module} import {name}")
            except ImportError as error:
                # the module, one above it, or the name
                assert re.match(rf"jaxllm has no {package}\.[\w.]+; (?!of this module)", str(error)), error


def test_names_have_the_same_homes_on_both_roads():
    for path in ("sampling_params", "outputs", "config", "v1.metrics.reader", "utils.argparse_utils"):
        for name, home in MODULES[path].items():
            if not isinstance(home, Missing):
                ours, theirs = (importlib.import_module(f"{package}.{path}") for package in ("jaxllm", "vllm"))
                assert getattr(ours, name) is getattr(theirs, name)


def test_modules_are_attributes_of_their_package():
    vllm = importlib.import_module("vllm")
    assert vllm.sampling_params.SamplingParams is vllm.SamplingParams
    assert vllm.v1.metrics.reader.Counter.__name__ == "Counter"
    with pytest.raises(ModuleNotFoundError, match="jaxllm has no vllm.no_such_module; of this module it has: "):
        importlib.import_module("vllm.no_such_module")


def test_the_platform_is_jaxs():
    import jax

    platform = importlib.import_module("jaxllm.platforms").current_platform
    assert (platform.is_cpu(), platform.is_cuda(), platform.is_rocm()) == (True, False, False)
    assert (platform.device_type, platform.device_name, platform.device_count()) == ("cpu", "cpu", jax.device_count())
    assert platform.get_device_name() == jax.devices()[0].device_kind


def test_the_functions_that_scripts_import(monkeypatch: pytest.MonkeyPatch):
    utils = importlib.import_module("jaxllm.utils")
    assert (utils.cdiv(7, 2), utils.round_up(7, 4), utils.GiB_bytes) == (4, 8, 1 << 30)
    with socket.socket() as listening:
        listening.bind((utils.get_ip(), importlib.import_module("jaxllm.utils.network_utils").get_open_port()))
    monkeypatch.delitem(sys.modules, "numpy.random", raising=False)  # which numpy imports when it is used
    importlib.import_module("vllm.model_executor.utils").set_random_seed(3)
    assert np.random.random() == np.random.RandomState(3).random()
    assert random.random() == random.Random(3).random()
    importlib.import_module("vllm.distributed.parallel_state").destroy_model_parallel()
    assert issubclass(importlib.import_module("vllm.exceptions").VLLMValidationError, ValueError)


def test_the_tokenizer_by_vllms_names(tmp_path: Path):
    made = importlib.import_module("vllm.transformers_utils.tokenizer").get_tokenizer(
        write_tiny_model(tmp_path), tokenizer_mode="auto", trust_remote_code=False, revision=None, padding_side="left"
    )
    made.save_pretrained(tmp_path / "alone")
    alone = importlib.import_module("vllm.tokenizers").get_tokenizer(tmp_path / "alone", add_bos_token=False)
    assert alone.get_vocab() == made.get_vocab()
    with pytest.raises(ValueError, match="download_dir='/models' is not supported yet"):
        importlib.import_module("vllm.tokenizers").get_tokenizer(tmp_path, download_dir="/models")
    assert made.padding_side == "left" and isinstance(made, importlib.import_module("vllm.tokenizers").TokenizerLike)
    resolve = importlib.import_module("vllm.entrypoints.chat_utils").resolve_hf_chat_template
    assert resolve(tokenizer=made, chat_template=None, tools=None, model_config=None) == CHAT_TEMPLATE
    made.chat_template = None
    assert resolve(made, None, None, model_config=None) is None


def test_a_chat_template_is_read_by_vllms_name(tmp_path: Path):
    load = importlib.import_module("vllm.renderers.chat_utils").load_chat_template
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    assert load(chat_template=tmp_path / "template.jinja") == "{{ messages }}" == load("{{ messages }}")


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
    (tmp_path / "beside.py").write_text("number = 7\n")
    script.write_text(
        "import sys\n"
        "from beside import number\n"
        "from vllm import LLM, SamplingParams\n"
        "from vllm.sampling_params import StructuredOutputsParams\n"
        "import vllm.v1.metrics.reader\n"
        "assert __name__ == '__main__' and number == 7\n"
        "print(LLM.__module__, SamplingParams(max_tokens=3).max_tokens, vllm.__version__, sys.argv[1:])\n"
        "try:\n"
        "    from vllm.config import NoSuchConfig\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    run = [sys.executable, "-m", "jaxllm.as_vllm", script, "--flag", "x"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("jaxllm.llm 3 ") and first.endswith(" ['--flag', 'x']")
    assert second.startswith(
        "jaxllm has no vllm.config.NoSuchConfig; of this module it has: PoolerConfig, ProfilerConfig,"
    )
    (tmp_path / "library.py").write_text(
        "import importlib.metadata, importlib.util, vllm\n"
        "from packaging.version import parse\n"
        "version = importlib.metadata.version('vllm')\n"
        "assert version == vllm.__version__ and parse(version) >= parse('0.33') and importlib.util.find_spec('vllm')\n"
        "assert not any(found.name == 'vllm' for found in importlib.metadata.distributions())\n"
        "print(__name__, __import__('sys').argv[1:])\n"
    )
    library = [*run[:3], "-m", "library", "--flag"]
    done = subprocess.run(library, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "__main__ ['--flag']\n"
    server = [*run[:3], "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--ssl-keyfile", "key"]
    done = subprocess.run(server, capture_output=True, text=True)
    assert done.returncode == 1 and "it has no TLS: put a server in front" in done.stderr
    command = [*run[:3], "-m", "vllm.entrypoints.cli.main", "serve", "m", "--ssl-keyfile", "key"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "it has no TLS: put a server in front" in done.stderr
    done = subprocess.run([*run[:3], tmp_path / "none.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"there is no {tmp_path / 'none.py'}"


def test_the_real_one_is_not_replaced(tmp_path: Path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = "import vllm\nimport jaxllm.as_vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "vllm itself has been imported already" in done.stderr
    code = "import jaxllm.as_vllm\nfrom vllm import LLM\nprint(LLM.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "jaxllm.llm\n"
