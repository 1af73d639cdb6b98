"""What is broken or slow about a machine, each with its remedy."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence

from jaxllm.entrypoints.doctor.folders import Folder
from jaxllm.entrypoints.doctor.jax_here import JaxHere
from jaxllm.entrypoints.doctor.machine import Machine
from jaxllm.entrypoints.doctor.packages import Package

_GB = 10**9
#: laptops have as many
_FEW_CORES = 4
_LITTLE_MEMORY = 4 * _GB
_LITTLE_DISK = 2 * _GB
#: no engine starts; what happens is not tested; an engine runs, and could run faster
KINDS = ("broken", "doubtful", "slow")
_GPU_PLUGINS = ("cuda12", "cuda13")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it could be."""

    problem: str
    remedy: str
    #: one of `KINDS`
    kind: str = "slow"

    def __str__(self) -> str:
        return f"{self.kind}: {self.problem}.\n    {self.remedy}."


def findings(
    machine: Machine,
    packages: Sequence[Package],
    jax: JaxHere,
    folders: Sequence[Folder],
    environment: Mapping[str, str],
) -> list[Finding]:
    """Return what is broken, and then what is doubtful or slow."""
    found = [
        *_packages(packages),
        *_jax(packages, jax, environment),
        *_gpu(machine, packages, jax, environment),
        *(_processor(machine) if _computes_on_cpu(jax) else ()),
        *_memory(machine),
        *_folders(folders),
    ]
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def _computes_on_cpu(jax: JaxHere) -> bool:
    return all(device.platform == "cpu" for device in jax.devices)


def _packages(packages: Sequence[Package]) -> Iterator[Finding]:
    needed = [package for package in packages if not package.extra]
    missing = [package.name for package in needed if package.version is None]
    if missing:
        yield Finding(
            problem=f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            remedy="Run pip install . in a checkout of jaxllm",
            kind="broken",
        )
    for package in packages:
        if package.version is not None and not package.fits:
            yield Finding(
                problem=f"{package.name} is {package.version}, and jaxllm is made for {package.wanted}",
                remedy=f"{_pip()} install {shlex.quote(package.name + package.wanted)}",
                kind="doubtful",
            )


def _jax(packages: Sequence[Package], jax: JaxHere, environment: Mapping[str, str]) -> Iterator[Finding]:
    if any(package.name == "jax" and package.version is None for package in packages):
        return  # which is said already
    if jax.error and not jax.jax:
        yield Finding(
            problem=f"JAX does not import: {jax.error.rstrip('.')}",
            remedy=f"{_pip()} install --force-reinstall jax jaxlib, both of one version",
            kind="broken",
        )
    elif jax.error:
        platforms = environment.get("JAX_PLATFORMS")
        yield Finding(
            problem=f"JAX has no devices: {jax.error.rstrip('.')}",
            remedy=f"JAX_PLATFORMS={platforms} is set: unset it, or set it to cpu"
            if platforms
            else "Set JAX_PLATFORMS=cpu",
            kind="broken",
        )
    if jax.compile_cache:
        yield Finding(
            problem=f"JAX's own compile cache is set ({jax.compile_cache}), and jaxllm keeps no programs beside it",
            remedy="Unset JAX_COMPILATION_CACHE_DIR: jaxllm's starts are faster, since it does not trace what it has",
        )


def _gpu(
    machine: Machine, packages: Sequence[Package], jax: JaxHere, environment: Mapping[str, str]
) -> Iterator[Finding]:
    if not machine.nvidia or not jax.devices or not _computes_on_cpu(jax):
        return
    plugins = [package.name for package in packages if package.extra in _GPU_PLUGINS and package.version]
    problem = f"there is an NVIDIA card ({machine.nvidia[0]}), and JAX does not use it"
    if "cpu" in environment.get("JAX_PLATFORMS", "").split(","):
        yield Finding(problem=problem, remedy="JAX_PLATFORMS=cpu is set: unset it")
    elif plugins:
        remedy = f"{plugins[0]} is installed, so look at what nvidia-smi and JAX_PLATFORMS=cuda jaxllm doctor say"
        yield Finding(problem=problem, remedy=remedy)
    else:
        remedy = "In a checkout of jaxllm: pip install '.[cuda12]' or '.[cuda13]', as the driver has it (nvidia-smi)"
        yield Finding(problem=problem, remedy=remedy)


def _processor(machine: Machine) -> Iterator[Finding]:
    features = machine.features
    if machine.architecture in ("x86_64", "AMD64") and features is not None:
        if "AVX2" not in features:
            yield Finding(
                problem="the processor has no AVX2, and XLA's products take several times as long",
                remedy="Take another machine, or let the virtual machine show the host's processor (-cpu host)",
            )
        elif "AVX-512" not in features:
            yield Finding(
                problem="the processor has no AVX-512: bfloat16 is computed as float32, in vectors of half the width, "
                "so prompts and large batches take about twice as long or more",
                remedy="Take a machine with AVX-512 BF16 or AMX (AMD since Zen 4, Intel Xeon since Sapphire Rapids), "
                "or a GPU; one request alone is held back by memory, and loses less",
            )
    usable = machine.usable_cores
    if machine.core_quota is not None and machine.core_quota < usable:
        whole = max(1, math.floor(machine.core_quota))
        yield Finding(
            problem=f"this process runs on {usable} cores and may use the time of {machine.core_quota:g} (its control "
            "group's quota): with a thread on every core it is stopped again and again",
            remedy=f"Start it on {whole}: taskset -c 0-{whole - 1} jaxllm ..., or docker run --cpuset-cpus in place of "
            "--cpus",
        )
    elif usable < machine.cores:
        yield Finding(
            problem=f"this process may run on {usable} of the machine's {machine.cores} cores",
            remedy="Start it without taskset, or ask the job's scheduler or the container for more",
        )
    if usable < _FEW_CORES:
        yield Finding(
            problem=f"{usable} core{'s' if usable > 1 else ''} for everything: tokens per second grow with the cores",
            remedy="Take a machine with more, or a smaller model",
        )


def _memory(machine: Machine) -> Iterator[Finding]:
    sizes = [size for size in (machine.available_bytes, machine.memory_limit) if size is not None]
    if sizes and min(sizes) < _LITTLE_MEMORY:
        what = "the control group's limit" if machine.memory_limit == min(sizes) else "available"
        yield Finding(
            problem=f"{min(sizes) / _GB:.1f} GB of memory ({what}) are few",
            remedy="jaxllm plan MODEL says what a model needs; a smaller --max-model-len and --max-num-seqs need less",
        )


def _folders(folders: Sequence[Folder]) -> Iterator[Finding]:
    for folder in folders:
        where = f"{folder.path} ({folder.name})"
        if not folder.writable:
            lost = {"programs": "every start compiles what is not there", "models": "no model can be fetched"}
            yield Finding(
                problem=f"{where} cannot be written, so {lost.get(folder.name, 'nothing can be downloaded')}",
                remedy=_elsewhere(folder),
            )
        elif folder.is_slow:
            yield Finding(
                problem=f"{where} is on {folder.filesystem}, another machine's disk, which makes starts slow",
                remedy=_elsewhere(folder),
            )
        elif folder.free is not None and folder.free < _LITTLE_DISK:
            yield Finding(
                problem=f"{where} has {folder.free / _GB:.1f} GB left on its disk",
                remedy=f"Free some. {_elsewhere(folder)}",
            )


def _elsewhere(folder: Folder) -> str:
    name = "HF_HOME" if folder.name == "hub" else "JAXLLM_CACHE"
    return f"Set {name} to a folder on a local disk"


def _pip() -> str:
    return f"{sys.executable} -m pip"
