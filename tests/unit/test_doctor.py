"""``jaxllm doctor``: what it finds of a machine, and what it makes of that."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import jaxllm
from jaxllm.entrypoints.doctor.findings import Finding, findings
from jaxllm.entrypoints.doctor.folders import Folder, folder_at
from jaxllm.entrypoints.doctor.jax_here import Device, JaxHere
from jaxllm.entrypoints.doctor.machine import Machine, this_machine
from jaxllm.entrypoints.doctor.packages import Package, packages

ROOT = Path(__file__).parents[2]
GIB = 2**30

MACHINE = Machine(
    system="Linux",
    architecture="x86_64",
    processor="Some processor",
    features=frozenset(("AVX2", "AVX-512")),
    cores=8,
    usable_cores=8,
    core_quota=None,
    memory_bytes=64 * GIB,
    available_bytes=60 * GIB,
    memory_limit=None,
    nvidia=(),
)
JAX = JaxHere(jax="0.10.2", jaxlib="0.10.2", devices=(Device(platform="cpu", kind="cpu"),))
PACKAGE = Package(name="jax", wanted=">=0.10.2,<0.13", version="0.10.2")
FOLDER = Folder(name="programs", path=Path("/cache/xla"), size=1, writable=True, filesystem="ext4", free=100 * GIB)


def found(
    jax: JaxHere = JAX,
    package: Package = PACKAGE,
    folder: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **machine: Any,
) -> list[Finding]:
    """What is found of a good machine that differs in these."""
    return findings(
        dataclasses.replace(MACHINE, **machine),
        [package],
        jax,
        [dataclasses.replace(FOLDER, **(folder or {}))],
        environment or {},
    )


def test_a_good_machine_has_no_findings():
    assert found() == []


@pytest.mark.parametrize(
    ("machine", "problem", "remedy"),
    [
        ({"features": frozenset(("AVX2",))}, "no AVX-512", "AMX"),
        ({"features": frozenset()}, "no AVX2", "-cpu host"),
        ({"usable_cores": 2}, "2 of the machine's 8 cores", "taskset"),
        ({"cores": 2, "usable_cores": 2}, "2 cores for everything", "smaller model"),
        ({"core_quota": 2.5}, "runs on 8 cores and may use the time of 2.5", "taskset -c 0-1 jaxllm"),
        ({"available_bytes": 2 * GIB}, r"2\.1 GB of memory \(available\)", "--max-model-len"),
        ({"memory_limit": GIB}, r"1\.1 GB of memory \(the control group's limit\)", "--max-model-len"),
        ({"nvidia": ("NVIDIA L4",)}, "an NVIDIA card .NVIDIA L4.*does not use it", r"pip install '\.\[cuda12\]'"),
        ({"folder": {"writable": False}}, "/cache/xla .programs. cannot be written, so every start", "JAXLLM_CACHE"),
        ({"folder": {"filesystem": "nfs4"}}, "on nfs4, another machine's disk", "JAXLLM_CACHE"),
        ({"folder": {"name": "hub", "free": GIB}}, r"1\.1 GB left", "HF_HOME"),
        ({"jax": dataclasses.replace(JAX, compile_cache="/c")}, "JAX's own compile cache.*/c", "COMPILATION_CACHE_DIR"),
    ],
)  # fmt: skip
def test_what_is_slow_has_its_remedy(machine: dict[str, Any], problem: str, remedy: str):
    first = found(**machine)[0]
    assert first.kind == "slow"
    assert re.search(problem, first.problem) and re.search(remedy, first.remedy), str(first)


def test_a_processor_does_not_matter_beside_a_gpu():
    jax = dataclasses.replace(JAX, devices=(Device(platform="gpu", kind="NVIDIA L4", memory=22 * GIB),))
    assert found(jax, features=frozenset(), nvidia=("NVIDIA L4",)) == []


def test_a_card_that_is_hidden_or_silent_is_told_apart():
    (hidden,) = found(nvidia=("NVIDIA L4",), environment={"JAX_PLATFORMS": "cpu"})
    assert hidden.remedy == "JAX_PLATFORMS=cpu is set: unset it"
    plugin = Package(name="jax-cuda12-plugin", wanted="", version="0.10.2", extra="cuda12")
    (silent,) = found(package=plugin, nvidia=("NVIDIA L4",))
    assert "jax-cuda12-plugin is installed" in silent.remedy and "nvidia-smi" in silent.remedy


def test_what_is_broken_comes_first():
    broken = JaxHere(error="ImportError: libstdc++.so.6 is too old")
    first, second = found(broken, cores=2, usable_cores=2)
    assert (first.kind, second.kind) == ("broken", "slow")
    assert first.problem == "JAX does not import: ImportError: libstdc++.so.6 is too old"
    missing = dataclasses.replace(PACKAGE, version=None)
    (only,) = found(broken, missing)
    assert str(only).endswith("jax is not installed.\n    Run pip install . in a checkout of jaxllm.")
    other = dataclasses.replace(PACKAGE, version="0.9.0")
    (finding,) = found(package=other)
    assert finding.kind == "doubtful" and "jax is 0.9.0, and jaxllm is made for >=0.10.2,<0.13" in finding.problem
    no_devices = dataclasses.replace(JAX, devices=(), error="Unable to initialize backend 'cuda'")
    (finding,) = found(no_devices, environment={"JAX_PLATFORMS": "cuda"})
    assert finding.kind == "broken" and finding.remedy == "JAX_PLATFORMS=cuda is set: unset it, or set it to cpu"


def test_a_folder_is_known_by_the_disk_that_it_is_on(tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"a / ext4 rw 0 0\n"
        f"b {tmp_path}/far\\040away nfs4 rw 0 0\n"
        f"c {tmp_path} xfs rw 0 0\n"
        f"d {tmp_path}/farther tmpfs rw\n"
    )
    (tmp_path / "far away").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "near" / "link").symlink_to("file")
    near = folder_at("models", tmp_path / "near", mounts)
    assert (near.filesystem, near.writable, near.is_slow) == ("xfs", True, False)
    assert near.size == 1000 + len("file") and near.free
    far = folder_at("models", tmp_path / "far away" / "to" / "come", mounts)
    assert (far.filesystem, far.size, far.writable, far.is_slow) == ("nfs4", None, True, True)
    # nothing can be made below a file, whoever tries it
    assert not folder_at("models", tmp_path / "near" / "file" / "models", mounts).writable


def test_this_machine_is_what_the_system_says():
    machine = this_machine()
    assert machine.usable_cores == len(os.sched_getaffinity(0)) and machine.cores == os.cpu_count()
    (total,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert machine.memory_bytes == int(total) * 1024
    if machine.architecture == "x86_64":
        assert machine.features is not None
        assert ("AVX2" in machine.features) == (" avx2" in Path("/proc/cpuinfo").read_text())


def test_packages_are_those_that_jaxllm_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = packages()
    needed = {package.name for package in there if not package.extra}
    assert {name.lower().replace("_", "-") for name in needed} == {
        text.split(">=")[0].lower().replace("_", "-") for text in project["dependencies"]
    }
    extras = {package.extra for package in there} - {""}
    assert {"cuda12", "cuda13", "plot", "tables", "orbax"} <= extras <= set(project["optional-dependencies"])
    assert not {"dev", "test", "smoke", "peers", "notebooks"} & extras
    # what an extra of JAX's brings is its plugin; what one of another package brings has no name of its own
    names = {package.name for package in there if package.extra}
    assert names >= {"jax-cuda12-plugin", "mistral-common", "ray"} and not {name for name in names if "[" in name}
    for package in there:
        if not package.extra:
            assert package.version == importlib.metadata.version(package.name) and package.fits, package


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxllm", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_the_report(tmp_path: Path):
    result = doctor(JAXLLM_CACHE=str(tmp_path / "cache"), HF_TOKEN="secret", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        f"  jaxllm                {jaxllm.__version__}  ",
        f"  imported              jax {importlib.metadata.version('jax')}, jaxlib ",
        "  cpu 0                 cpu",
        f"  cores                 {len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process",
        f"  models                {tmp_path}/cache/models  (not there yet, writable, ",
        f"  programs              {tmp_path}/cache/xla  (not there yet, writable, ",
        "  JAX_PLATFORMS         cpu",
    ):
        assert f"\n{line}" in result.stdout
    assert "secret" not in result.stdout and not result.stderr
    # looking changes nothing
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise ImportError('no such symbol')", "JAX does not import: ImportError: no such symbol"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "JAX does not import: Python was ended by SIGILL while it imported JAX",
        ),
    ],
)
def test_a_jax_that_is_broken_is_told(tmp_path: Path, source: str, why: str):
    (tmp_path / "jax.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = doctor(PYTHONPATH=path)
    assert result.returncode == 1
    assert "jax: it does not import" in result.stdout and f"broken: {why}" in result.stdout
    assert "--force-reinstall" in result.stdout and not result.stderr
