"""Starts `worker.py` for every JAX and every GPU, and gathers what it says."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxllm.config.devices import GPU, gpu_named
from jaxllm.runner.compile.deviceless import CudaCompiler

ROOT = Path(__file__).parents[2]
#: one GPU of each architecture
TARGETS: dict[str, GPU] = {gpu.architecture: gpu for gpu in map(gpu_named, ("a100-80g", "h200", "b200"))}
#: a case -> what `worker.compile_case` says of it, or {"error": text}
Results = dict[str, dict[str, Any]]
#: whether a part is compiled, as `make compile-cuda QUICK=1` asks
QUICK = os.environ.get("COMPILE_CUDA_QUICK", "0") not in ("", "0")
#: processes at once; each compiles in threads
_WORKERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toolchain:
    """A Python with JAX, and the CUDA compiler of that JAX."""

    jax: str
    python: str
    folder: Path


def toolchains() -> list[Toolchain]:
    """This Python's, and that of `make test-py312`, as far as `make compile-cuda` has installed their compilers."""
    places = ((sys.executable, ".cuda-compiler"), (str(ROOT / ".venv312/bin/python"), ".cuda-compiler312"))
    found = []
    for python, name in places:
        wheels = sorted((ROOT / name).glob("jax_cuda12_pjrt-*.dist-info"))
        if wheels and Path(python).exists():
            version = wheels[-1].name.removeprefix("jax_cuda12_pjrt-").removesuffix(".dist-info")
            found.append(Toolchain(jax=version, python=python, folder=ROOT / name))
    return found


def compile_everywhere(
    *, quick: bool, only: str = "", jaxes: Iterable[str] = (), tell: Callable[[str], None] = lambda line: None
) -> dict[tuple[str, str], Results]:
    """(version of JAX, target) -> results.

    Args:
        quick: a part of the cases. Where there are two versions of JAX, each compiles half of them for a GPU, and the
            other half for the next.
        only: text that the names of cases must contain.
        jaxes: versions; none: all that are there.
        tell: told each configuration that has ended.
    """
    wanted = tuple(jaxes)
    chosen = [t for t in toolchains() if not wanted or t.jax in wanted]
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        futures = {
            (toolchain.jax, target): pool.submit(
                compile_for,
                toolchain,
                target,
                quick=quick,
                part=(i + j) % 2 if quick and len(chosen) == 2 else None,
                only=only,
                tell=tell,
            )
            for i, toolchain in enumerate(chosen)
            for j, target in enumerate(TARGETS)
        }
        return {key: future.result() for key, future in futures.items()}


def compile_for(
    toolchain: Toolchain,
    target: str,
    *,
    quick: bool = False,
    part: int | None = None,
    only: str = "",
    tell: Callable[[str], None] = lambda line: None,
) -> Results:
    """Results of every case. One that ends its process is told as an error, and the others go on in a new one."""
    found: Results = {}
    while True:
        command = [toolchain.python, "-m", "compile_cuda.worker", target, "--only", only]
        command += ["--quick"] if quick else []
        command += [] if part is None else ["--part", str(part)]
        command += [f"--skip={name}" for name in found]
        begun = None
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command,
                cwd=ROOT / "tests",  # where the package is found
                env=CudaCompiler(folder=toolchain.folder, cuda="12").environment(),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    event = json.loads(line)
                    name = event.pop("case")
                    begun = name if event.pop("begins", False) else None
                    if begun is None:
                        found[name] = event
                        tell(f"JAX {toolchain.jax}, {target}, {name}: {event.get('error', 'compiled')}")
            errors.seek(0)
            said = errors.read()[-3000:]
        if process.returncode == 0:
            return found
        where = begun or "(start)"
        found[where] = {"error": f"ended its process with {process.returncode}:\n{said}"}
        tell(f"JAX {toolchain.jax}, {target}, {where}: {found[where]['error']}")
        if begun is None:
            return found
