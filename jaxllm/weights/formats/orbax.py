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
import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import JaxLLMError
from jaxllm.api.extras import how_to_install
from jaxllm.layers.weight import WeightSpec, is_spec
from jaxllm.parallel.rules import each_sharding
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.whole import gather, is_split, scatter

#: the arrays' folder inside a model's directory, beside config.json
FOLDER = "orbax"
#: arrays are stored and read in pieces of this many bytes: a piece is in host memory several times while it is unpacked
CHUNK_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class _Array:
    """What a file holds as one array: a leaf of the weights, or that of every segment, the first layers' first."""

    specs: list[WeightSpec] = dataclasses.field(default_factory=list)
    #: of each, where it is known
    shardings: list[Any] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.specs[0].shape
        return shape if len(self.specs) == 1 else (sum(spec.shape[0] for spec in self.specs), *shape[1:])

    def value(self, leaves: list[jax.Array]) -> Any:
        """What is saved; in the host's memory where segments have to be joined, or the parts of devices."""
        pairs = zip(self.specs, leaves, strict=True)
        parts = [gather(spec, leaf) if is_split(spec, leaf.sharding) else leaf for spec, leaf in pairs]
        if len(parts) == 1:
            return parts[0]
        joined = np.empty(self.shape, leaves[0].dtype)
        for place, part in zip(self.split(joined), parts, strict=True):
            place[...] = part
        return joined

    def split(self, joined: np.ndarray) -> list[np.ndarray]:
        """Each segment's part of the array."""
        return np.split(joined, list(itertools.accumulate(spec.shape[0] for spec in self.specs[:-1])))


def save(directory: Path, params: Any, specs: Any) -> None:
    """Write the arrays into ``directory/orbax``. All layers are stacked there, whatever segments the engine has, and
    arrays are whole, over however many devices they are split.

    Args:
        specs: what each of `params` is, a tree of `WeightSpec`s of the same form.

    Raises:
        WeightsError: that folder exists.
    """
    folder = (directory / FOLDER).absolute()
    if folder.exists():
        raise WeightsError(f"{folder} exists already; save into another directory, or remove it first")
    names = iter(_names(specs))
    leaves: dict[str, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(params):
        leaves.setdefault(next(names), []).append(leaf)
    tree = {name: array.value(leaves[name]) for name, array in _arrays(specs).items()}
    with _checkpointer() as (checkpointer, ocp):
        how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=how))


def load(directory: Path, specs: Any, dtype: jnp.dtype, sharding: Any) -> Any:
    """Read a model's arrays, one after the other. What is cut, into segments or into the parts of devices, is in the
    host's memory for it, one array at a time.

    Args:
        specs, dtype, sharding: as for `loader.load`.

    Raises:
        WeightsError: the stored arrays have other names or shapes, or cannot be read.
    """
    wanted = _arrays(specs, each_sharding(specs, sharding))
    folder = (directory / FOLDER).absolute()
    # an array as large as the limit would be refused
    largest = max(math.prod(a.shape) * jnp.dtype(a.specs[0].dtype or dtype).itemsize for a in wanted.values())
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
            own = jnp.dtype(array.specs[0].dtype or dtype)
            is_cut = len(array.specs) > 1 or is_split(array.specs[0], array.shardings[0])
            if is_cut:
                how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=own)
            else:
                how = ocp.ArrayRestoreArgs(sharding=array.shardings[0], global_shape=array.shape, dtype=own)
            args = ocp.args.PyTreeRestore({name: 0}, restore_args={name: how}, partial_restore=True)
            try:
                value = checkpointer.restore(folder, args=args)[name]
            except Exception as error:  # what orbax raises for unreadable data is a bare Exception
                raise WeightsError(f"{folder}: tensor {name} cannot be read: {error!r:.300}") from error
            parts = [value]
            if is_cut:
                pieces = array.split(value) if len(array.specs) > 1 else [value]
                parts = list(map(scatter, array.specs, pieces, array.shardings))
            read[name] = iter(jax.block_until_ready(parts))
    names = iter(_names(specs))
    return jax.tree.map(lambda _: next(read[next(names)]), specs, is_leaf=is_spec)


@contextlib.contextmanager
def _checkpointer(in_flight_bytes: int = 2**30) -> Iterator[tuple[Any, Any]]:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise JaxLLMError(f"orbax-checkpoint is not installed: {how_to_install('orbax')}.") from None
    gigabytes: Any = in_flight_bytes * 1e-9  # declared to be whole, but only ever multiplied
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes)) as checkpointer:
        yield checkpointer, ocp


def _arrays(specs: Any, shardings: Any = None) -> dict[str, _Array]:
    """By `_names`."""
    own = iter(jax.tree.leaves(shardings))
    arrays: dict[str, _Array] = {}
    for name, spec in zip(_names(specs), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        array = arrays.setdefault(name, _Array())
        array.specs.append(spec)
        array.shardings.append(next(own, None))
    return arrays


def _names(specs: Any) -> list[str]:
    """Of each leaf, the path without the number of its segment, such as ``layers.qkv``. Where segments have it in
    different forms (quantized layers), its shape and dtype are behind it.
    """
    leaves = jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    paths = [_path(path) for path, _ in leaves]
    forms = [("x".join(map(str, spec.shape[spec.layers is not None :])), spec.dtype) for _, spec in leaves]
    found: dict[str, set[tuple[str, Any]]] = {}
    for path, form in zip(paths, forms, strict=True):
        found.setdefault(path, set()).add(form)
    return [
        path if len(found[path]) == 1 else f"{path}.{form[0]}.{form[1]}"
        for path, form in zip(paths, forms, strict=True)
    ]


def _path(path: tuple[Any, ...]) -> str:
    """The parts of a joined matrix are numbered; segments are not."""
    words = []
    for before, key in zip((None, *path), path, strict=False):
        if not isinstance(key, jax.tree_util.SequenceKey):
            words.append(str(key.name))
        elif str(getattr(before, "name", "")) != "layers":
            words.append(str(key.idx))
    return ".".join(words)
