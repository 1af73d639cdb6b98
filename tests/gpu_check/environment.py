"""Stage 1: which machine this is, and what it reaches at best. Every other stage is measured by these ceilings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import jax
import jax.numpy as jnp
import psutil

from gpu_check import records
from gpu_check.sizes import sizes
from gpu_check.timing import seconds_per_run

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt"),
    *("numpy", "torch", "transformers", "triton", "nvidia-cublas", "nvidia-cublas-cu12", "llguidance"),
)
_SMI_FIELDS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def main() -> None:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    records.fact("python", platform.python_version())
    records.fact("versions", versions)
    records.fact("host", {"cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total})
    device = jax.devices()[0]
    records.fact(
        "device",
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(jax.devices()),
            "compute_capability": getattr(device, "compute_capability", None),
            "memory_stats": device.memory_stats(),
        },
    )
    if not records.is_rehearsal():
        if not records.check(records.HAS_GPU, device.platform == "gpu", f"the default device is {device}"):
            raise SystemExit(1)
        records.fact("nvidia-smi", _nvidia_smi())
    _copy()
    _matmul()
    records.check("ceilings are measured", True)


def _nvidia_smi() -> dict[str, str] | str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    values = asked.stdout.splitlines()[0].split(", ")
    return dict(zip(_SMI_FIELDS.split(","), values, strict=False))


def _copy() -> None:
    """Both ways of copying; the faster one is the ceiling. Random data: constants can be faster."""
    size = sizes()
    draw = jax.jit(lambda key: jax.random.bits(key, (size.copy_bytes // 4,), jnp.uint32))
    x = jax.block_until_ready(draw(jax.random.key(0, impl="rbg")))
    ways = {
        "copy": jax.jit(lambda x: jnp.copy(x)),
        "kernel": jax.jit(lambda x: x ^ jnp.uint32(1)),
    }
    for name, way in ways.items():
        seconds = seconds_per_run(way.lower(x).compile(), (x,), repeats=size.repeats, launches=10)
        records.measurement("ceiling: copy", name, seconds, num_bytes=2 * size.copy_bytes)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.uint32)).lower(x).compile()
    seconds = seconds_per_run(total, (x,), repeats=size.repeats, launches=10)
    records.measurement("read only", "sum", seconds, num_bytes=size.copy_bytes)


def _matmul() -> None:
    size = sizes()
    n = size.matmul_size
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16)).lower(a, b).compile()
    seconds = seconds_per_run(product, (a, b), repeats=size.repeats, launches=10)
    records.measurement("ceiling: matmul", f"{n} x {n} x {n} bf16", seconds, flops=2 * n**3)


if __name__ == "__main__":
    main()
