"""Saved models: the device arrays as they are, through orbax (an optional dependency)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import JaxLLMError
from jaxllm.weights.errors import WeightsError

#: the arrays' folder inside a model's directory, beside config.json
FOLDER = "orbax"
#: arrays are stored and read in pieces of this many bytes: a piece is in host memory several times while it is unpacked
CHUNK_BYTES = 2**27


def save(directory: Path, params: Any) -> None:
    """Write the arrays into ``directory/orbax``. Raises WeightsError when that exists."""
    folder = (directory / FOLDER).absolute()
    if folder.exists():
        raise WeightsError(f"{folder} exists already; save into another directory, or remove it first")
    tree = _tree(params)
    with _checkpointer() as (checkpointer, ocp):
        how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tree}
        checkpointer.save(folder, args=ocp.args.StandardSave(tree, save_args=how))


def load(directory: Path, shapes: Any) -> Any:
    """Read arrays with the shapes, dtypes and shardings of `shapes`.

    Raises:
        WeightsError: the stored arrays have other names or shapes, or cannot be read.
    """
    wanted, structure = jax.tree.flatten(shapes)
    tree = _tree(shapes)
    folder = (directory / FOLDER).absolute()
    # about one array at a time (an array as large as the limit would be refused); orbax's own default reads all at once
    largest = max(math.prod(array.shape) * array.dtype.itemsize for array in wanted)
    with _checkpointer(in_flight_bytes=largest + CHUNK_BYTES) as (checkpointer, ocp):
        try:
            stored = getattr(checkpointer.metadata(folder).item_metadata, "tree", {})
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder}: not a readable orbax checkpoint: {error}") from error
        if not stored:
            raise WeightsError(f"{folder}: not a readable orbax checkpoint")
        for name in sorted(tree.keys() | stored.keys()):
            shape, found = (tuple(t[name].shape) if name in t else None for t in (tree, stored))
            if shape != found:
                raise WeightsError(
                    f"{folder}: tensor {name!r} has shape {found}, the model's config asks for {shape} (None: absent)"
                )
        try:
            arrays = checkpointer.restore(folder, args=ocp.args.StandardRestore(tree))
        except Exception as error:  # what orbax raises for unreadable data is a bare Exception
            names = [name for name in tree if f"'{name}/'" in str(error)]
            raise WeightsError(f"{folder}: tensor {', '.join(names)} cannot be read: {error!r:.300}") from error
    return jax.tree.unflatten(structure, [arrays[name] for name in tree])


@contextlib.contextmanager
def _checkpointer(in_flight_bytes: int = 2**30) -> Iterator[tuple[Any, Any]]:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise JaxLLMError("orbax-checkpoint is not installed: pip install 'jaxllm[orbax]'") from None
    gigabytes: Any = in_flight_bytes * 1e-9  # declared to be whole, but only ever multiplied
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)) as checkpointer:
        yield checkpointer, ocp


def _tree(params: Any) -> dict[str, jax.Array]:
    """Leaves by their path, such as ``layers.qkv``."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {".".join(str(getattr(key, "name", key)) for key in path): leaf for path, leaf in leaves}
