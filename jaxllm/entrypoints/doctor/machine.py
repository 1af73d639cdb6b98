"""What this machine has, and what of it this process may use. Everything here is found without JAX."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from jaxllm.config.control_group import control_group

#: what the processor's vectors and matrices are called -> the system's names for it
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AMX": ("amx_tile",),
    "AMX BF16": ("amx_bf16",),
    "NEON": ("asimd",),
    "SVE": ("sve",),
    "BF16": ("bf16",),
    "I8MM": ("i8mm",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Sizes are bytes; None: the system does not say, or there is no limit."""

    system: str
    architecture: str
    processor: str
    #: of `FEATURES`
    features: frozenset[str] | None
    cores: int
    #: that this process may run on
    usable_cores: int
    #: processor time that its control group has, in cores
    core_quota: float | None
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit: int | None
    #: NVIDIA cards that the driver shows
    nvidia: tuple[str, ...]


def this_machine() -> Machine:
    """Return what this machine has."""
    about = _first_processor()
    flags = (about.get("flags") or about.get("Features") or "").split()
    features = frozenset(name for name, known in FEATURES.items() if not set(known).isdisjoint(flags))
    cores = os.cpu_count() or 1
    total, available = _memory()
    group = control_group()
    return Machine(
        system=platform.platform(),
        architecture=platform.machine(),
        processor=about.get("model name") or platform.processor() or platform.machine(),
        features=features if flags else None,
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        core_quota=group.cores,
        memory_bytes=total,
        available_bytes=available,
        memory_limit=group.memory_bytes,
        nvidia=_nvidia_cards(),
    )


def _first_processor() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> tuple[int | None, int | None]:
    try:
        import psutil
    except ImportError:  # the packages' part of the report says so
        return None, None
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _nvidia_cards() -> tuple[str, ...]:
    cards = []
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = (line.partition(":") for line in about.read_text().splitlines())
        cards.append(next((value.strip() for name, _, value in lines if name == "Model"), "NVIDIA GPU"))
    # in some containers the driver shows the devices alone
    return tuple(cards) or tuple("NVIDIA GPU" for _ in Path("/dev").glob("nvidia[0-9]*"))
