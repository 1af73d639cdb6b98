"""The devices of a model that is split, and the programs that they run.

Every device runs the same program on its part of the weights and of the KV cache (`jax.shard_map` around the whole
step): what a device computes by itself needs no partitioner, so kernels run in it as they do on one device, and what
devices exchange is written where it happens (`layers.linear`, `layers.embedding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

#: the mesh's axis over which heads, the MLP and the vocabulary are split
TENSOR = "tp"


def make_mesh(devices: Sequence[Any]) -> jax.sharding.Mesh:
    """All devices along `TENSOR`."""
    return jax.sharding.Mesh(np.array(devices, dtype=object), (TENSOR,))


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
