"""What decides which program is traced and compiled, as text that is the same in every process."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxllm
import pallas_kernels

#: files that say what is computed, and with which tiles
_SOURCES = (".py", ".json")
#: JAX's settings that say where programs are kept, and what is told about them
_UNRELATED = ("cache", "dump", "log", "profil", "traceback")
_PACKAGES = ("jaxllm", "pallas_kernels")
#: packages that take part in tracing and compiling
_COMPILERS = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("jax-triton", "triton", "llvmlite"),
)
_CPU_LINES = ("model name", "flags", "Features")


def described(value: Any) -> str:
    """A value as text, equal for equal values and no others: numbers, texts, dtypes, shapes with their shardings, and
    dataclasses, mappings, sequences and trees of them. Classes are those of these packages, whose sources are known.

    Raises:
        TypeError: the value has something else in it, a function or a user's class for example.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | np.dtype):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, type) and issubclass(value, np.generic):
        return f"dtype:{np.dtype(value)!r}"
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"array:{value.shape}:{value.dtype}:{_sharding(value.sharding)}"
    if isinstance(value, tuple | list):
        return f"{_type(value)}({','.join(map(described, value))})"
    if isinstance(value, dict):
        return f"dict({','.join(f'{described(name)}={described(each)}' for name, each in value.items())})"
    if type(value).__module__.split(".")[0] not in _PACKAGES:
        raise TypeError(f"{type(value)} is not described by its value")
    if isinstance(value, enum.Enum):
        return f"{_type(value)}.{value.name}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return f"{_type(value)}({','.join(f'{name}={described(each)}' for name, each in fields)})"
    raise TypeError(f"{value!r} is not described by its value")


def environment(devices: Sequence[Any]) -> str:
    """Everything that a program depends on besides its arguments and its sources: the machine, the versions, JAX's
    settings (those of the calling thread), the environment variables of XLA.
    """
    client = devices[0].client
    return "\n".join(
        [
            f"{client.platform} {client.platform_version} {[(device.id, device.device_kind) for device in devices]}",
            _versions(),
            _machine(),
            *(f"{name}={value!r}" for name, value in sorted(settings().items())),
            *(f"{name}={os.environ.get(name)!r}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        ]
    )


def settings() -> dict[str, Any]:
    """JAX's settings that programs depend on, as the calling thread has them."""
    return {n: getattr(jax.config, n, value) for n, value in jax.config.values.items() if not _is_unrelated(n)}


def has_own_settings() -> bool:
    """Whether the calling thread has settings that a new one does not have: it is in one of JAX's contexts."""
    others: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: others.append(settings()))
    thread.start()
    thread.join()
    return bool(changed(others[0]))


def changed(before: dict[str, Any]) -> list[str]:
    """The settings that the calling thread has otherwise. What a module adds that is imported later is none."""
    return [name for name, value in settings().items() if value != before.get(name, value)]


def _is_unrelated(setting: str) -> bool:
    return any(word in setting for word in _UNRELATED)


def _versions() -> str:
    found = [f"python {sys.version}"]
    for package in _COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


@functools.cache
def sources() -> str:
    """A hash of both packages' sources, whole: what a program is made of is nowhere written down."""
    digest = hashlib.sha256()
    for package, path in source_files():
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def source_files() -> list[tuple[Path, Path]]:
    """(folder of the package, file) of every source of both packages."""
    packages = (Path(next(iter(package.__path__))) for package in (jaxllm, pallas_kernels))
    return [(each, path) for each in packages for path in sorted(each.rglob("*")) if path.suffix in _SOURCES]


@functools.cache
def _machine() -> str:
    """What the code generator and the division of work among threads look at."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {cores} cores {_cpu_features()}"


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(_CPU_LINES))


def _sharding(sharding: jax.sharding.Sharding | None) -> str:
    if sharding is None:
        return "None"
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh = sharding.mesh
        assert isinstance(mesh, jax.sharding.Mesh)
        devices = [device.id for device in mesh.devices.flat]
        return f"{mesh.axis_names}{mesh.axis_sizes}{devices}{sharding.spec}{sharding.memory_kind}"
    return f"{type(sharding).__name__}{sorted(device.id for device in sharding.device_set)}{sharding.memory_kind}"


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
