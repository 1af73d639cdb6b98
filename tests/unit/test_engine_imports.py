"""Law 2: the host's logic imports no jax."""

from __future__ import annotations

import subprocess
import sys

HOST_CORE = (
    "request",
    "block_hash",
    "block_pool",
    "kv_cache_manager",
    "prefix_cache_stats",
    "waiting_queue",
    "length_limits",
    "stop_check",
    "preemption",
    "scheduler",
)


def test_the_engine_package_pulls_in_no_jax() -> None:
    code = (
        "import importlib, pkgutil, sys, jaxllm.engine\n"
        "names = [module.name for module in pkgutil.walk_packages(jaxllm.engine.__path__)]\n"
        "for name in names: importlib.import_module('jaxllm.engine.' + name)\n"
        "print(*names)\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib', 'torch')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, device_modules = result.stdout.split("\n")[:2]
    assert set(HOST_CORE) <= set(names.split())
    assert device_modules == ""
