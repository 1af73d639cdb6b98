"""What an engine's programs are compiled for: devices that are there, or devices that are only described."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.config.devices import GPU
from jaxllm.parallel.mesh import TENSOR, ask_for_cpu_devices, make_mesh
from jaxllm.runner.memory.plan import device_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedDevice:
    """What is asked of one of JAX's devices before anything is compiled for it."""

    platform: str
    device_kind: str
    #: such as "9.0"
    compute_capability: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices of one engine, all of one kind."""

    #: JAX's name: "cpu" or "gpu"
    platform: str
    #: the driver's name
    kind: str
    #: bytes of one device, in all and not yet taken
    total_bytes: int
    free_bytes: int
    #: over which the model is split; of a pipeline, each stage
    num_devices: int = 1
    num_stages: int = 1
    #: one of them
    device: Any
    #: the stages' one after the other; () where there is nothing to compile with
    devices: tuple[Any, ...] = ()

    def stage(self, index: int) -> Target:
        """The devices of one stage of the pipeline."""
        if not self.devices:
            return dataclasses.replace(self, num_stages=1)
        own = self.devices[index * self.num_devices : (index + 1) * self.num_devices]
        return dataclasses.replace(self, num_stages=1, devices=own, device=own[0])

    def segments(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each segment of a model of equal layers (`models.segments`)."""
        return (num_layers,) if self.platform == "cpu" else (1,) * num_layers

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Of the mesh's axes, also where there is nothing to compile with."""
        return {TENSOR: self.num_devices}

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """All devices along one axis; None: there is but one, or nothing to compile with."""
        return make_mesh(self.devices) if len(self.devices) > 1 else None

    @property
    def sharding(self) -> Any:
        """Of an array that every device has whole; None where there is nothing to compile with."""
        if not self.devices:
            return None
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return jax.sharding.NamedSharding(self.mesh, jax.P())


def find_device(name: str) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The first device of a platform: "auto" takes what JAX prefers. Raises ValidationError when there is none."""
    if name == "auto":
        return jax.devices()[0]
    try:
        return jax.devices("cuda" if name in ("cuda", "gpu") else name)[0]
    except RuntimeError as error:
        raise ValidationError(
            f"device={name!r} is not there: {error}. For NVIDIA GPUs: {how_to_install('cuda12')}; where the driver "
            "has CUDA 13, cuda13 in place of cuda12."
        ) from error


def target_here(name: str, num_devices: int = 1, num_stages: int = 1) -> Target:
    """Devices of this machine, by their platform (`find_device`). A CPU becomes as many devices as are needed, unless
    JAX has started.

    Args:
        num_devices: over which the model is split, in each stage of a pipeline.

    Raises:
        ValidationError: there are not so many.
    """
    count = num_devices * num_stages
    if name in ("auto", "cpu"):
        ask_for_cpu_devices(count)
    device = find_device(name)
    present = jax.devices(device.platform)
    if len(present) < count:
        more = ""
        if device.platform == "cpu":
            more = (
                " JAX has started: make the engine before anything else asks JAX for its devices, or start Python with "
                f"JAX_NUM_CPU_DEVICES={count} in its environment."
            )
        sizes = {"tensor_parallel_size": num_devices, "pipeline_parallel_size": num_stages}
        asked = [f"{size}={number}" for size, number in sizes.items() if number > 1]
        needed = "needs as many devices" if len(asked) == 1 else f"need {count} devices"
        raise ValidationError(f"{' and '.join(asked)} {needed}; JAX has {len(present)} of {device.platform}." + more)
    total, free = device_memory(device)
    if device.platform == "cpu":  # they share the machine's memory
        total, free = total // count, free // count
    return Target(
        platform=device.platform,
        kind=device.device_kind,
        total_bytes=total,
        free_bytes=free,
        num_devices=num_devices,
        num_stages=num_stages,
        device=device,
        devices=(device,) if count == 1 else tuple(present[:count]),
    )


def target_described(gpu: GPU, devices: tuple[Any, ...] = (), *, num_devices: int = 1, num_stages: int = 1) -> Target:
    """GPUs that are not there, with all of their memory free.

    Args:
        devices: what to compile for (`deviceless.devices`); () where there is no compiler.
    """
    capability = ".".join(map(str, gpu.compute_capability))
    described = DescribedDevice(platform="gpu", device_kind=gpu.description, compute_capability=capability)
    return Target(
        platform="gpu",
        kind=gpu.description,
        total_bytes=gpu.memory_bytes,
        free_bytes=gpu.memory_bytes,
        num_devices=num_devices,
        num_stages=num_stages,
        device=devices[0] if devices else described,
        devices=devices,
    )
