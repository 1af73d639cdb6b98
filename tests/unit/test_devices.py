"""The table of GPUs, and what is found of a compiler for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import DEVICE_NAMES, GPUS, device_name, gpu_named
from jaxllm.runner.compile.deviceless import CudaCompiler, default_folder, find_compiler, search_places, target_config

GIB = 2**30


def test_the_names_that_are_promised():
    assert DEVICE_NAMES == ("a100-40g", "a100-80g", "l4", "rtx4090", "h100", "h200", "b200", "cpu")


@pytest.mark.parametrize("text", ["H200", "h200", " nvidia H200 ", "NVIDIA_h200"])
def test_case_and_separators_do_not_matter(text: str):
    assert gpu_named(text) is GPUS["h200"]


@pytest.mark.parametrize(("text", "hint"), [("a100", "'a100-40g' or 'a100-80g'"), ("h20O", "'h200'"), ("tpu", "")])
def test_an_unknown_device_names_the_known_ones(text: str, hint: str):
    with pytest.raises(ValidationError) as raised:
        device_name(text)
    assert text in str(raised.value) and hint in str(raised.value)
    assert all(name in str(raised.value) for name in DEVICE_NAMES)


def test_a_cpu_is_no_gpu():
    assert device_name("CPU") == "cpu"
    with pytest.raises(ValidationError, match="not a GPU"):
        gpu_named("cpu")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_numbers_are_those_of_the_card(gpu):
    """Marketing's gigabytes, within what a driver keeps; limits within what the architecture has."""
    sold = {"a100-40g": 40, "a100-80g": 80, "l4": 24, "rtx4090": 24, "h100": 80, "h200": 141, "b200": 180}[gpu.name]
    assert 0.91 * sold * GIB < gpu.memory_bytes < 1.08 * sold * 10**9
    assert gpu.shared_memory_per_block < gpu.shared_memory_per_block_optin < gpu.shared_memory_per_sm <= 228 * 1024
    # bytes a product must read before its arithmetic costs more than its memory: a few hundred on all of them
    assert 100 < gpu.bf16_flops / gpu.memory_bandwidth < 500
    assert gpu.architecture == {"a": "sm_80", "l": "sm_89", "r": "sm_89", "h": "sm_90", "b": "sm_100"}[gpu.name[0]]
    text = target_config(gpu)
    assert f"device_memory_size: {gpu.memory_bytes}" in text and text.count("{") == text.count("}")


#: "memory.total" of nvidia-smi, MiB, of which the driver keeps a little
NVIDIA_SMI = {
    "a100-40g": 40960,
    "a100-80g": 81920,
    "l4": 23034,
    "rtx4090": 24564,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_a_process_has_a_little_less_memory_than_the_card(gpu):
    assert 0.975 < gpu.memory_bytes / 2**20 / NVIDIA_SMI[gpu.name] < 1


def fake_compiler(folder: Path, version: str, tag: str = "") -> Path:
    for part in ("pjrt", "plugin"):
        info = folder / f"jax_cuda12_{part}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jax-cuda12-{part}\nVersion: {version}\n")
        library = folder / f"jax_cuda12_{part}" / f"_triton.{tag}.so"
        library.parent.mkdir()
        library.touch()
        (info / "RECORD").write_text(f"{library.relative_to(folder)},,\n")
    return folder


def test_a_compiler_is_found_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = fake_compiler(tmp_path / "there", jax.__version__)
    expected = CudaCompiler(folder=folder, cuda="12")
    assert find_compiler(folder) == expected
    monkeypatch.setenv("JAXLLM_CUDA_COMPILER", str(folder))
    assert search_places()[0] == folder and find_compiler() == expected
    assert default_folder() in search_places()


@pytest.mark.parametrize(
    ("version", "tag", "told"),
    [("0.1.2", "", "0.1.2, which does not fit JAX"), (jax.__version__, "cpython-39-x86_64", "cpython-39")],
)
def test_a_compiler_that_does_not_fit(tmp_path: Path, version: str, tag: str, told: str):
    with pytest.raises(ValidationError, match=told) as raised:
        find_compiler(fake_compiler(tmp_path, version, tag))
    assert "pip install" in str(raised.value)


def test_no_compiler_in_the_folder(tmp_path: Path):
    with pytest.raises(ValidationError, match=r"has no jax-cuda12-pjrt.*pip install .*jax-cuda12-plugin=="):
        find_compiler(tmp_path)


def test_the_environment_of_a_compiler():
    base = {"JAX_ENABLE_X64": "1", "HOME": "/home/me", "PYTHONPATH": "/elsewhere", "XLA_FLAGS": "--x"}
    environment = CudaCompiler(folder=Path("/compiler"), cuda="12").environment(base)
    found = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(found[0]) / "jaxllm" / "__init__.py").samefile(jaxllm.__file__)
    assert found[1:] == ["/compiler", "/elsewhere"]
    assert environment["JAX_PLATFORMS"] == "cuda,cpu" and environment["HOME"] == "/home/me"
    assert "JAX_ENABLE_X64" not in environment and "XLA_FLAGS" not in environment


def test_the_table_imports_no_jax():
    code = "import sys, jaxllm.config.devices; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
