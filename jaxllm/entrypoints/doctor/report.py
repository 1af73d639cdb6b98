"""``jaxllm doctor`` says what is installed and what this machine has; what is slow or broken, and the remedy.

It starts no engine, imports JAX in another process, and works without what is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jaxllm
from jaxllm.api.extras import how_to_install
from jaxllm.entrypoints.doctor.findings import Finding, findings
from jaxllm.entrypoints.doctor.folders import Folder, cache_folders
from jaxllm.entrypoints.doctor.jax_here import JaxHere, jax_here
from jaxllm.entrypoints.doctor.machine import FEATURES, Machine, this_machine
from jaxllm.entrypoints.doctor.packages import Package, is_installed, packages

_GB = 10**9
#: what of the environment changes how an engine runs; secrets are not among it
_VARIABLES = ("JAX", "XLA", "HF_HOME", "HF_HUB", "CUDA_VISIBLE_DEVICES", "NPROC", "PJRT_NPROC", "XDG_CACHE_HOME")

Row = tuple[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Print the report. The exit status is 1 where something is broken, so that no engine starts, and 0 elsewhere."""
    machine, there, folders = this_machine(), packages(), cache_folders()
    jax = jax_here()
    found = findings(machine, there, jax, folders, os.environ)
    print(_section("versions", [*_versions(jax), *_packages(there)]))
    print(_section("extras", _extras(there)))
    print(_section("devices", _devices(jax)))
    print(_section("machine", _machine(machine)))
    print(_section("caches", (_cache(folder) for folder in folders)))
    print(_section("environment", _environment(os.environ)))
    print(_findings(found))
    return 1 if any(finding.kind == "broken" for finding in found) else 0


def _section(title: str, rows: Iterable[Row]) -> str:
    lines = [f"  {name:<22}{text}" for name, text in rows]
    return "\n".join([title, *(lines or ["  nothing"]), ""])


def _versions(jax: JaxHere) -> Iterator[Row]:
    place = Path(jaxllm.__file__).parent
    yield "jaxllm", f"{jaxllm.__version__}  {place}{'' if is_installed() else ' (not installed: found on the path)'}"
    yield "Python", f"{platform.python_version()}  {sys.executable}"
    # JAX's own words, where it has some: what is installed may not be what is imported
    yield "imported", f"jax {jax.jax}, jaxlib {jax.jaxlib}" if jax.jax else "jax: it does not import"


def _packages(there: Sequence[Package]) -> Iterator[Row]:
    for package in there:
        if not package.extra:
            yield package.name, _version(package)


def _extras(there: Sequence[Package]) -> Iterator[Row]:
    for extra in dict.fromkeys(package.extra for package in there if package.extra):
        of = [package for package in there if package.extra == extra]
        text = ", ".join(f"{package.name} {_version(package)}" for package in of)
        missing = any(package.version is None for package in of)
        yield extra, f"{text}; {how_to_install(extra)}" if missing else text


def _version(package: Package) -> str:
    if package.version is None:
        return "not installed"
    return package.version if package.fits else f"{package.version} (wanted: {package.wanted})"


def _devices(jax: JaxHere) -> Iterator[Row]:
    if jax.error:
        yield "error", jax.error
    for number, device in enumerate(jax.devices):
        memory = "" if device.memory is None else f", {device.memory / _GB:.1f} GB"
        yield f"{device.platform} {number}", f"{device.kind}{memory}"


def _machine(machine: Machine) -> Iterator[Row]:
    yield "system", machine.system
    yield "processor", machine.processor
    if machine.features is not None:
        own = [name for name in FEATURES if name in machine.features]
        on_x86 = machine.architecture in ("x86_64", "AMD64")
        lacking = [name for name in ("AVX2", "AVX-512", "AMX") if on_x86 and name not in machine.features]
        yield "features", ", ".join(own) + (f" (not: {', '.join(lacking)})" if lacking else "")
    quota = "" if machine.core_quota is None else f", time of {machine.core_quota:g} (control group)"
    yield "cores", f"{machine.usable_cores} of {machine.cores} for this process{quota}"
    if machine.memory_bytes is not None and machine.available_bytes is not None:
        yield "memory", f"{machine.memory_bytes / _GB:.1f} GB, {machine.available_bytes / _GB:.1f} GB available"
    limit = machine.memory_limit
    yield "memory limit", "none" if limit is None else f"{limit / _GB:.1f} GB (control group)"
    yield "NVIDIA cards", ", ".join(machine.nvidia) or "none"


def _cache(folder: Folder) -> Row:
    size = "not there yet" if folder.size is None else f"{folder.size / _GB:.2f} GB"
    parts = [size, "writable" if folder.writable else "NOT writable"]
    parts += [folder.filesystem] if folder.filesystem else []
    parts += [] if folder.free is None else [f"{folder.free / _GB:.0f} GB free"]
    return folder.name, f"{folder.path}  ({', '.join(parts)})"


def _environment(environment: Mapping[str, str]) -> Iterator[Row]:
    for name, value in sorted(environment.items()):
        if name.startswith(_VARIABLES) and "TOKEN" not in name:
            yield name, value


def _findings(found: Sequence[Finding]) -> str:
    if not found:
        return "Nothing is broken, and nothing makes this machine slower than it has to be."
    return "\n".join(["what to do", *(f"  {finding}" for finding in found)])
