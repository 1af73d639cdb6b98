"""Saved models: the device arrays, all layers stacked, through orbax (an optional dependency)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.api.errors import JaxLLMError
from jaxllm.weights.errors import WeightsError

#: the arrays' folder inside a model's directory, beside config.json
FOLDER = "orbax"
#: arrays are stored and read in pieces of this many bytes: a piece is in host memory several times while it is unpacked
CHUNK_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class _Array:
    """What a file holds as one array: a leaf of the weights, or that of every segment, the first layers' first."""

    leaves: list[Any] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.leaves[0].shape)
        return shape if len(self.leaves) == 1 else (sum(leaf.shape[0] for leaf in self.leaves), *shape[1:])

    def value(self) -> Any:
        """What is saved; in the host's memory where segments have to be joined."""
        if len(self.leaves) == 1:
            return self.leaves[0]
        joined = np.empty(self.shape, self.leaves[0].dtype)
        for part, leaf in zip(self.split(joined), self.leaves, strict=True):
            part[...] = leaf
        return joined

    def split(self, joined: np.ndarray) -> list[np.ndarray]:
        """Each leaf's part of the array."""
        return np.split(joined, list(itertools.accumulate(leaf.shape[0] for leaf in self.leaves[:-1])))


def save(directory: Path, params: Any) -> None:
    """Write the arrays into ``directory/orbax``. All layers are stacked there, whatever segments the engine has.

    Raises:
        WeightsError: that folder exists.
    """
    folder = (directory / FOLDER).absolute()
    if folder.exists():
        raise WeightsError(f"{folder} exists already; save into another directory, or remove it first")
    tree = {name: array.value() for name, array in _arrays(params).items()}
    with _checkpointer() as (checkpointer, ocp):
        how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=how))


def load(directory: Path, shapes: Any) -> Any:
    """Read arrays with the shapes, dtypes and shardings of `shapes`, one after the other. Several segments are
    taken from the stored stacks, which are in the host's memory for it, one at a time.

    Raises:
        WeightsError: the stored arrays have other names or shapes, or cannot be read.
    """
    wanted = _arrays(shapes)
    folder = (directory / FOLDER).absolute()
    # an array as large as the limit would be refused
    largest = max(math.prod(array.shape) * array.leaves[0].dtype.itemsize for array in wanted.values())
    with _checkpointer(in_flight_bytes=largest + CHUNK_BYTES) as (checkpointer, ocp):
        try:
            stored = getattr(checkpointer.metadata(folder).item_metadata, "tree", {})
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder}: not a readable orbax checkpoint: {error}") from error
        if not stored:
            raise WeightsError(f"{folder}: not a readable orbax checkpoint")
        for name in sorted(wanted.keys() | stored.keys()):
            shape, found = (tuple(t[name].shape) if name in t else None for t in (wanted, stored))
            if shape != found:
                raise WeightsError(
                    f"{folder}: tensor {name!r} has shape {found}, the model's config asks for {shape} (None: absent)"
                )
        read: dict[str, Iterator[jax.Array]] = {}
        for name, array in wanted.items():
            leaf = array.leaves[0]
            several = len(array.leaves) > 1
            if several:
                how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            else:
                how = ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            args = ocp.args.PyTreeRestore({name: 0}, restore_args={name: how}, partial_restore=True)
            try:
                value = checkpointer.restore(folder, args=args)[name]
            except Exception as error:  # what orbax raises for unreadable data is a bare Exception
                raise WeightsError(f"{folder}: tensor {name} cannot be read: {error!r:.300}") from error
            parts = [jax.device_put(part, leaf.sharding) for part in array.split(value)] if several else [value]
            read[name] = iter(jax.block_until_ready(parts))
    return jax.tree.map_with_path(lambda path, _: next(read[_name(path)]), shapes)


@contextlib.contextmanager
def _checkpointer(in_flight_bytes: int = 2**30) -> Iterator[tuple[Any, Any]]:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise JaxLLMError(
            "orbax-checkpoint is not installed: in a checkout of jaxllm, pip install '.[orbax]'"
        ) from None
    gigabytes: Any = in_flight_bytes * 1e-9  # declared to be whole, but only ever multiplied
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes)) as checkpointer:
        yield checkpointer, ocp


def _arrays(params: Any) -> dict[str, _Array]:
    """By the path of their leaves, such as ``layers.qkv``."""
    arrays: dict[str, _Array] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        arrays.setdefault(_name(path), _Array()).leaves.append(leaf)
    return arrays


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.name) for key in path if not isinstance(key, jax.tree_util.SequenceKey))
