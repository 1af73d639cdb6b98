"""Saved models: the device arrays as they are, through orbax (an optional dependency)."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxllm.errors import JaxLLMError
from jaxllm.models.decoder import Params
from jaxllm.weights.errors import WeightsError

#: the arrays' folder inside a model's directory, beside config.json
FOLDER = "orbax"


def _checkpointer():
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise JaxLLMError("orbax-checkpoint is not installed: pip install 'jaxllm[orbax]'") from None
    return ocp.StandardCheckpointer()


def save(directory: Path, params: Params) -> None:
    """Write the arrays into ``directory/orbax``, which must not exist."""
    with _checkpointer() as checkpointer:
        checkpointer.save((directory / FOLDER).absolute(), _tree(params))


def load(directory: Path, shapes: Params) -> Params:
    """Read arrays with the shapes, dtypes and shardings of `shapes`. Raises WeightsError when they do not match."""
    wanted, structure = jax.tree.flatten(shapes)
    with _checkpointer() as checkpointer:
        folder = (directory / FOLDER).absolute()
        try:
            stored = checkpointer.metadata(folder).item_metadata.tree
        except (OSError, ValueError, AttributeError) as error:
            raise WeightsError(f"{folder}: not a readable orbax checkpoint: {error}") from error
        names = list(_tree(shapes))
        for name, shape in zip(names, wanted, strict=True):
            found = stored.get(name)
            if found is None or tuple(found.shape) != tuple(shape.shape):
                raise WeightsError(
                    f"{folder}: tensor {name!r} has shape {None if found is None else tuple(found.shape)}, "
                    f"the model's config asks for {tuple(shape.shape)}"
                )
        arrays = checkpointer.restore(folder, _tree(shapes))
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def _tree(params: Params) -> dict[str, jax.Array]:
    """Leaves by their path, such as ``layers.qkv``."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {".".join(str(getattr(key, "name", key)) for key in path): leaf for path, leaf in leaves}
