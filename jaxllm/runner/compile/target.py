"""What an engine's programs are compiled for: devices that are there, or devices that are only described."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.config.devices import GPU
from jaxllm.config.parallel import ONE_DEVICE, Grid
from jaxllm.parallel.mesh import DATA, TENSOR, ask_for_cpu_devices, make_mesh
from jaxllm.parallel.processes import engine_devices, is_distributed, num_processes, of_all_processes
from jaxllm.runner.memory.plan import device_memory, host_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedDevice:
    """What is asked of one of JAX's devices before anything is compiled for it."""

    platform: str
    device_kind: str
    #: such as "9.0"
    compute_capability: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """The devices of one engine, all of one kind; or those of one of its replicas, or of one stage of that. Programs
    are made for one stage of one replica, or for all replicas, which step together then.
    """

    #: JAX's name: "cpu" or "gpu"
    platform: str
    #: the driver's name
    kind: str
    #: bytes of one device, in all and not yet taken
    total_bytes: int
    free_bytes: int
    #: bytes of the machine's memory that are not taken; None: nobody knows the machine
    host_bytes: int | None = None
    grid: Grid = ONE_DEVICE
    #: copies of the model that have one copy of the weights between them, and what there is of memory in equal parts
    sharers: int = 1
    #: one of them
    device: Any
    #: of objects, [data, stage, tensor], as many as the grid has; None: there is nothing to compile with
    devices: np.ndarray | None = None

    def replica(self, number: int) -> Target:
        """The devices of one copy of the model."""
        return self._part(self.grid._replace(data=1), slice(number, number + 1))

    def stage(self, number: int) -> Target:
        """The devices of one run of layers, in every copy."""
        return self._part(self.grid._replace(stage=1), slice(None), slice(number, number + 1))

    def _part(self, grid: Grid, *index: slice) -> Target:
        if self.devices is None:
            return dataclasses.replace(self, grid=grid)
        devices = self.devices[index]
        return dataclasses.replace(self, grid=grid, devices=devices, device=devices.flat[0])

    def segments(self, runs: tuple[int, ...]) -> tuple[int, ...]:
        """Layers of each segment of a model (`models.segments`).

        Args:
            runs: how many layers of a kind follow each other, from the first to the last.
        """
        return runs if self.platform == "cpu" else (1,) * sum(runs)

    @property
    def num_devices(self) -> int:
        """Over which each layer is split."""
        return self.grid.tensor

    @property
    def replicas(self) -> int:
        """Copies of the model that programs for these devices are of."""
        return self.grid.data

    @property
    def num_processes(self) -> int:
        """That run the engine together."""
        return 1 if self.devices is None else num_processes(self.devices.flat)

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Of the mesh's axes, also where there is nothing to compile with."""
        copies = {DATA: self.replicas} if self.replicas > 1 else {}
        return {**copies, TENSOR: self.grid.tensor}

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices of one stage of one replica along one axis, or those of all replicas along two; None: there is
        but one, or there is nothing to compile with.
        """
        if self.devices is None or self.replicas == self.grid.tensor == 1:
            return None
        assert self.grid.stage == 1, "a program is made for one stage"
        return make_mesh(self.devices[0, 0] if self.replicas == 1 else self.devices[:, 0])

    @property
    def sharding(self) -> Any:
        """Of an array that every device has whole; None where there is nothing to compile with."""
        if self.devices is None:
            return None
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(self.device)
        return jax.sharding.NamedSharding(self.mesh, jax.P())


def find_device(name: str) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """This process's first device of a platform: "auto" takes what JAX prefers.

    Raises:
        ValidationError: there is none.
    """
    if name == "auto":
        return jax.local_devices()[0]
    try:
        return jax.local_devices(backend="cuda" if name in ("cuda", "gpu") else name)[0]
    except RuntimeError as error:
        raise ValidationError(
            f"device={name!r} is not there: {error}. For NVIDIA GPUs: {how_to_install('cuda12')}; where the driver "
            "has CUDA 13, cuda13 in place of cuda12."
        ) from error


def target_here(name: str, grid: Grid = ONE_DEVICE, *, together: bool = False) -> Target:
    """Devices of this machine, by their platform (`find_device`). A CPU becomes as many devices as are needed, unless
    JAX has started; copies of a model that is not split share one of them.

    Args:
        together: copies of the model step together, each on devices of its own.

    Raises:
        ValidationError: there are not so many.
    """
    shares = grid.stage == grid.tensor == 1 and not together
    if name in ("auto", "cpu") and not is_distributed():
        ask_for_cpu_devices(1 if shares else grid.size)
    device = find_device(name)
    on_cpu = device.platform == "cpu"
    present = [device] * grid.data if on_cpu and shares else engine_devices(device.platform, grid)
    if len(present) < grid.size:
        more = f" Set numbers whose product is at most {len(present)}."
        if on_cpu:
            more = (
                " JAX has started: make the engine before anything else asks JAX for its devices, or start Python with "
                f"JAX_NUM_CPU_DEVICES={grid.size} in its environment."
            )
        raise ValidationError(f"{_needs(grid)}; JAX has {len(present)} of {device.platform}.{more}")
    memory = [device_memory(one) for one in dict.fromkeys(present) if one.process_index == device.process_index]
    # those of a CPU share the machine's memory, of which each process has its own
    processes = num_processes(present)
    share = grid.size // processes if on_cpu else 1
    total, free = min(total for total, _ in memory) // share, min(free for _, free in memory) // share
    if processes > 1:
        total, free = of_all_processes((total, free)).min(axis=0).tolist()
    return Target(
        platform=device.platform,
        kind=device.device_kind,
        total_bytes=total,
        free_bytes=free,
        host_bytes=host_memory(),
        grid=grid,
        sharers=grid.data if on_cpu and shares else 1,
        device=device,
        devices=_array(present, grid),
    )


def _needs(grid: Grid) -> str:
    asked = str(grid)
    return f"{asked} needs {grid.size} devices" if " x " in asked else f"{asked} needs as many devices"


def _array(devices: Sequence[Any], grid: Grid) -> np.ndarray:
    """The devices as `Target.devices` has them."""
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    return array.reshape(grid)


def target_described(gpu: GPU, devices: Sequence[Any] = (), *, grid: Grid = ONE_DEVICE) -> Target:
    """GPUs that are not there, with all of their memory free.

    Args:
        devices: what to compile for (`deviceless.devices`), as many as the grid has; () where there is no compiler.
    """
    capability = ".".join(map(str, gpu.compute_capability))
    described = DescribedDevice(platform="gpu", device_kind=gpu.description, compute_capability=capability)
    return Target(
        platform="gpu",
        kind=gpu.description,
        total_bytes=gpu.memory_bytes,
        free_bytes=gpu.memory_bytes,
        grid=grid,
        device=devices[0] if devices else described,
        devices=_array(devices, grid) if devices else None,
    )
