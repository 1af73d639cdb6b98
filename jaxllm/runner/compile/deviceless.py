"""Compiling for GPUs that are not there.

XLA's CUDA compiler needs a description of the GPU, not the GPU. It comes with JAX's CUDA plugin (the wheels
``jax-cuda12-pjrt`` and ``jax-cuda12-plugin``, or 13; nothing else of CUDA), of the very version of JAX. Two processes
take part: one finds the compiler (`find_compiler`) and starts the other with an environment of its own
(`CudaCompiler.environment`), since a plugin without a GPU is in the way of everything else, and since a compiler for
another target may abort its process; the other asks for devices (`devices`) and compiles for their shardings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.config.devices import GPU

#: names a folder that has the compiler
FOLDER_VARIABLE = "JAXLLM_CUDA_COMPILER"
_CUDA_VERSIONS = ("13", "12")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaCompiler:
    """Where JAX's CUDA compiler is."""

    #: to put on the path; None: it is installed beside jaxllm
    folder: Path | None
    #: of CUDA, "12" or "13"
    cuda: str

    def __str__(self) -> str:
        return f"jax-cuda{self.cuda}-pjrt {jax.__version__} in {self.folder or 'this environment'}"

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a process that compiles.

        Args:
            base: what to start from; None: this process's. JAX's own settings are left out of it.
        """
        kept = {name: value for name, value in (os.environ if base is None else base).items() if _is_kept(name)}
        # where this package is found, and not the package itself, whose modules have names of other packages
        here = Path(__file__).parents[3]
        path = [str(here), *([str(self.folder)] if self.folder else []), kept.pop("PYTHONPATH", "")]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "JAX_PLATFORMS": "cuda,cpu",
            # without it the plugin refuses a machine that has no driver
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            # Shardy of JAX 0.11.2 may crash on a shard_map that is given what it does not use
            "JAX_USE_SHARDY_PARTITIONER": "false",
        }


def _is_kept(name: str) -> bool:
    return not name.startswith("JAX_") and name != "XLA_FLAGS"


def search_places(folder: str | os.PathLike[str] | None = None) -> list[Path | None]:
    """Where a compiler is looked for, in order; None: the environment that jaxllm runs in.

    Args:
        folder: the user's own, the only place then.
    """
    if folder is not None:
        return [Path(folder).expanduser()]
    named = os.environ.get(FOLDER_VARIABLE)
    return [
        *([Path(named).expanduser()] if named else []),
        None,
        Path(".cuda-compiler").absolute(),
        default_folder(),
    ]


def default_folder() -> Path:
    """Where `install_command` puts it."""
    return cache_folder() / "cuda-compiler" / f"jax-{jax.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"


def install_command() -> str:
    """What brings the compiler, about 180 MB, onto this machine without touching the environment."""
    wheels = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("pjrt", "plugin"))
    return f"pip install --no-deps --target {default_folder()} {wheels}"


def find_compiler(folder: str | os.PathLike[str] | None = None) -> CudaCompiler | None:
    """JAX's CUDA compiler, of JAX's own version and this Python's; None: it is nowhere in `search_places`.

    Raises:
        ValidationError: `folder` is given and has none, or another version's.
    """
    for place in search_places(folder):
        for cuda in _CUDA_VERSIONS:
            if _problem(place, cuda) is None:
                return CudaCompiler(folder=place, cuda=cuda)
    if folder is not None:
        place = search_places(folder)[0]
        problems = {cuda: _problem(place, cuda) for cuda in _CUDA_VERSIONS}
        told = next((problem for problem in problems.values() if problem and "has no" not in problem), problems["12"])
        raise ValidationError(f"{told} To install it: {install_command()}")
    return None


def _problem(place: Path | None, cuda: str) -> str | None:
    """Why there is no compiler at a place; None: there is one."""
    shown = "this environment" if place is None else str(place)
    for part in ("pjrt", "plugin"):
        found = _distribution(place, f"jax-cuda{cuda}-{part}")
        if found is None:
            return f"{shown} has no jax-cuda{cuda}-{part}."
        if found.version != jax.__version__:
            return f"{shown} has jax-cuda{cuda}-{part} {found.version}, which does not fit JAX {jax.__version__}."
        tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
        built = {match[0] for file in found.files or () if (match := re.search(r"cpython-\d+", file.name))}
        if built and tag not in built:
            return f"{shown} has a jax-cuda{cuda}-{part} for {', '.join(sorted(built))}, and this is {tag}."
    return None


def _distribution(place: Path | None, name: str) -> importlib.metadata.Distribution | None:
    path = sys.path if place is None else [str(place)]
    return next(iter(importlib.metadata.distributions(name=name, path=path)), None)


def target_config(gpu: GPU, *, cuda: str = "12") -> str:
    """XLA's description of a GPU: a ``stream_executor.GpuTargetConfigProto`` as text.

    Args:
        cuda: version of the compiler's CUDA, "12" or "13".
    """
    major, minor = gpu.compute_capability
    runtime = {"12": "major: 12 minor: 8", "13": "major: 13 minor: 0"}[cuda]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_sm}
  threads_per_core_limit: {gpu.threads_per_sm}
  core_count: {gpu.num_sms}
  fpus_per_core: {gpu.fpus_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {gpu.registers_per_sm}
  registers_per_block_limit: {gpu.registers_per_sm}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ {runtime} patch: 0 }}
device_description_str: "{gpu.description}"
"""


def devices(gpu: GPU, count: int = 1, *, cuda: str | None = None) -> list[Any]:
    """`count` devices of one machine, to compile for and nothing else. In a process with `CudaCompiler.environment`.

    Args:
        cuda: version of the compiler's CUDA; None: what `find_compiler` finds on the path.
    """
    from jax.experimental import topologies

    if cuda is None:
        cuda = next((version for version in _CUDA_VERSIONS if _distribution(None, f"jax-cuda{version}-pjrt")), "12")
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=target_config(gpu, cuda=cuda)
    )
    return list(topology.devices)


@contextlib.contextmanager
def lowering_for(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Lower programs for described devices inside: a kernel asks JAX for what GPU it is lowered, and JAX, which has
    none, would ask the CPU (JAX 0.11).
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield
