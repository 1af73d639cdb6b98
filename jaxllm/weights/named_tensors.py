"""A model's weights by Hugging Face's names, out of memory: what a training loop has (``model.state_dict()``)."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight import WeightSpec, is_spec
from jaxllm.parallel.rules import each_sharding
from jaxllm.weights.formats import hugging_face
from jaxllm.weights.loader import DERIVED, read_array
from jaxllm.weights.naming import CommonNames


class NamedTensors:
    """A `loader.WeightReader` of tensors in memory.

    Args:
        tensors: name -> array of floats: numpy's, JAX's or torch's, each as it is.

    Raises ValidationError for something else.
    """

    def __init__(self, tensors: Mapping[str, Any]):
        self._arrays = {name: _as_array(name, tensor) for name, tensor in tensors.items()}

    def names(self) -> Iterable[str]:
        return self._arrays.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> str:
        return self._arrays[name].dtype.name

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        return _rows_of(self._arrays[name], rows, within)

    #: nothing here is stored in another form than its own
    raw = read


class _Overlaid:
    """Tensors, and the model's own where they have none."""

    def __init__(self, given: CommonNames, own: Mapping[str, hugging_face.Tensor]):
        self._given, self._own = given, own
        self._names = set(given.names())
        #: the one of the model's own that was read last: it is asked for in pieces, and may be joined of several
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def names(self) -> Iterable[str]:
        return self._names | self._own.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._given.shape(name) if name in self._names else self._own[name].shape

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        if name in self._names:
            return self._given.read(name, rows, within)
        if self._last[0] != name:
            self._last = name, self._own[name].value()
        return _rows_of(self._last[1], rows, within)


def with_tensors(
    params: Any,
    tensors: Mapping[str, Any],
    *,
    specs: Any,
    sharding: Any,
    dtype: jnp.dtype,
    prefix: str,
    has_head: bool,
) -> Any:
    """The weights `params` with some tensors replaced, or all. An array that has none of them is the same one; others
    are new, and lie on the devices as theirs.

    Args:
        tensors: by Hugging Face's names, in its orientation, of any float dtype.
        specs: what each array of `params` is, a tree of `WeightSpec`s of the same form.
        sharding: see `loader.load`.
        dtype: of arrays whose spec has none of its own.
        prefix: see `naming.CommonNames`.
        has_head: whether the head is a matrix of its own. Where it is not, ``lm_head.weight`` is passed over: torch's
            state dicts have the embedding twice, and a model that generates has a head that pooling has no use for.

    Raises:
        ValidationError: a name that the model has not, or a tensor of another shape; nothing has been read then.
    """
    given = CommonNames(NamedTensors(tensors), prefix)
    names = set(given.names())
    own = {tensor.name: tensor for tensor in hugging_face.tensors(specs, params)}
    stored = jax.tree.map(lambda spec: spec.as_stored(names), specs, is_leaf=is_spec)
    used = set[str]()
    for spec in jax.tree.leaves(stored, is_leaf=is_spec):
        used.update(_checked(spec, given, names, own))
    for name in sorted(names - used):
        if name.endswith(DERIVED) or (name == "lm_head.weight" and not has_head):
            continue
        (close,) = difflib.get_close_matches(name, own, n=1, cutoff=0.0)
        raise ValidationError(f"{given.stored_name(name)!r} is no tensor of the model's. Did you mean {close!r}?")
    reader = _Overlaid(given, own)

    def one(spec: WeightSpec, array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        changes = any(name in names for name, _ in spec.tensors())
        return read_array(reader, spec, sharding, dtype) if changes else array

    return jax.tree.map(one, stored, params, each_sharding(specs, sharding), is_leaf=is_spec)


def _checked(
    spec: WeightSpec, given: CommonNames, names: set[str], own: Mapping[str, hugging_face.Tensor]
) -> list[str]:
    """Those of an array's tensors that are given."""
    found = {name: part for name, part in spec.tensors() if name in names}
    for name, part in found.items():
        if given.shape(name) != (wanted := spec.tensor_shape(part)):
            raise ValidationError(f"tensor {name!r} must have the shape {wanted}, got {given.shape(name)}.")
    missing = next((name for name, _ in spec.tensors() if name not in names and name not in own), None)
    if found and missing is not None:
        raise ValidationError(f"tensor {missing!r} is missing beside {next(iter(found))!r}: give both.")
    return list(found)


def _rows_of(array: np.ndarray, rows: slice | None, within: int | None) -> np.ndarray:
    array = array if within is None else array[within]
    return array if rows is None else array[rows]


def _as_array(name: str, tensor: Any) -> np.ndarray:
    """A tensor's own memory as numpy's, where it lies on the host."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy has none of its own, and torch gives it no other
            array = tensor.contiguous().view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
    else:
        array = np.asarray(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValidationError(f"tensor {name!r} must be of floats, got {array.dtype} of {type(tensor).__name__}.")
    return array
