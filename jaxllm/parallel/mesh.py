"""The devices of a model that is split, and the programs that they run.

Every device runs the same program on its part of the weights and of the KV cache (`jax.shard_map` around the whole
step): what a device computes by itself needs no partitioner, so kernels run in it as they do on one device, and what
devices exchange is written where it happens (`layers.linear`, `layers.embedding`).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

#: the axes of the devices, outermost first: copies of the model, each with requests of its own,
DATA = "data"
#: runs of layers, each with programs of its own,
STAGE = "stage"
#: and the devices that share every layer: heads, the MLP and the vocabulary are split over them
TENSOR = "tensor"


def make_mesh(devices: Sequence[Any] | np.ndarray) -> jax.sharding.Mesh:
    """Devices [tensor] along `TENSOR`; or [data, tensor], of copies of the model that step together, along both."""
    array = np.array(devices, dtype=object)
    return jax.sharding.Mesh(array, (TENSOR,) if array.ndim == 1 else (DATA, TENSOR))


def own_rows(mesh: jax.sharding.Mesh | None) -> jax.P:
    """How arrays are split of which each copy of the model has rows of its own: those of all of them, one behind the
    other; not at all where a program is that of one copy.
    """
    return jax.P(DATA) if mesh is not None and DATA in mesh.axis_names else jax.P()


def ask_for_cpu_devices(count: int) -> None:
    """Have JAX start with so many devices on the CPU, or more. Without effect where it has started."""
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    config: Any = jax.config
    asked = max(config.jax_num_cpu_devices, int(forced[1]) if forced else 1)
    if count > asked:
        with contextlib.suppress(RuntimeError):
            config.update("jax_num_cpu_devices", count)


class OneAtATime:
    """A compiled program of several devices of a CPU: a call returns when it is done.

    XLA:CPU runs them in one pool of threads, and who waits for the others in a collective keeps a thread. So of two
    programs that run at once each may have the threads that the other one waits for.
    """

    _lock = threading.Lock()

    def __init__(self, compiled: jax.stages.Compiled):
        self._compiled = compiled

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            return jax.block_until_ready(self._compiled(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def on_each_device(
    function: Callable[..., Any], mesh: jax.sharding.Mesh | None, args: Sequence[Any], out_specs: Any
) -> Callable[..., Any]:
    """`function` as it runs on every device of a mesh, on the device's part of each argument.

    Args:
        mesh: None: one device, which gets `function` as it is.
        args: trees of `jax.ShapeDtypeStruct` with `NamedSharding`s, which say what the parts are.
        out_specs: the results' `PartitionSpec`s, a prefix of their tree.
    """
    if mesh is None:
        return function
    specs = tuple(jax.tree.map(lambda shape: shape.sharding.spec, arg) for arg in args)
    # replicated results are equal by construction; the checker does not know all_gather's result to be
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
