"""What a runner holds on its devices: the weights, and the state between steps."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.models.offloaded import lies_on_host
from jaxllm.models.params import Params, without_draft
from jaxllm.models.segments import resegment, segment_sizes

Weights = TypeVar("Weights")
StateTree = TypeVar("StateTree")


class Allocator(Protocol):
    """What makes the state."""

    sharding: jax.sharding.Sharding
    #: of each array of the weights
    param_shardings: Any

    @property
    def spare_bytes(self) -> int:
        """Of the state, what nobody ever writes and takes no memory."""
        ...

    def allocate(self) -> object: ...


class DeviceMemory(abc.ABC, Generic[Weights, StateTree]):
    """Weights that can be freed, read again and replaced, and a state that can be freed and made anew.

    Args:
        params: the model's weights, on the device; None: `restore_weights` reads them.
        reload: reads them anew.
        allocator: makes the state.
        source: has the weights, of which these are a copy, or which these are on the same device.
    """

    def __init__(
        self,
        params: Weights | None,
        reload: Callable[[], Weights],
        allocator: Allocator,
        source: DeviceMemory[Weights, StateTree] | None = None,
    ):
        self.params = params
        self._reload, self._allocator, self._source = reload, allocator, source
        self._sharding = allocator.sharding
        #: whether nobody else holds the weights' arrays, so that they may be deleted
        self._owns_params = True
        #: copies in the host's memory, while the device's are freed
        self._on_host: Weights | None = None
        self._state: StateTree | None = allocator.allocate()  # pyright: ignore[reportAttributeAccessIssue]
        self._weights_changed()

    @abc.abstractmethod
    def _weights_changed(self) -> None:
        """Programs get `params` from here on; None: they are not on the device."""

    def _live(self) -> StateTree:
        if self._state is None:
            raise RuntimeError("the engine has been shut down")
        return self._state

    @property
    def num_bytes(self) -> int:
        """What the weights and the state take at present, wherever they are; weights that are the source's are not
        counted twice.
        """
        weights = None if self._shares_params else (self.params, self._on_host)
        arrays = jax.tree.leaves((weights, self._state))
        held = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray) or not array.is_deleted())
        # a step that is being launched, maybe by another thread, has consumed the state
        is_there = self._state is not None and not any(array.is_deleted() for array in jax.tree.leaves(self._state))
        return held - (self._allocator.spare_bytes if is_there else 0)

    @property
    def model_params(self) -> Any:
        """The weights of the model that the engine serves, and of no other one beside it."""
        return without_draft(self.params)

    @property
    def _shares_params(self) -> bool:
        """Whether its weights are the source's."""
        return self._source is not None and self.params is self._source.params

    def reset(self) -> None:
        """Allocate the state anew: a failed step may have consumed what was donated to it."""
        self.free_cache()
        self._state = self._allocator.allocate()  # pyright: ignore[reportAttributeAccessIssue]

    def free_cache(self) -> None:
        """Free the device state; `reset` makes it anew."""
        if self._state is not None:
            self._delete(self._state)
            self._state = None

    def free_weights(self, *, keep_on_host: bool) -> None:
        """Free the weights' memory on the device, where it is not the host's own."""
        params, sharding = self.params, self._sharding
        on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
        if params is None or (keep_on_host and on_cpu):
            return
        # the source keeps those that both have
        on_host = host_copies(params) if keep_on_host and self._source is None else None
        self._delete_params(kept=on_host)
        self._on_host = on_host

    def restore_weights(self) -> None:
        """Undo `free_weights`: from the host, or from where they were first read."""
        if self.params is not None:
            return
        on_host, shardings, source = self._on_host, self._allocator.param_shardings, self._source
        params = self._reload() if on_host is None else jax.device_put(on_host, shardings)
        if source is not None and jax.tree.leaves(shardings) != jax.tree.leaves(source._allocator.param_shardings):
            params = jax.device_put(params, shardings)
        self._use(params, owned=source is None or params is not source.params)

    def reload_weights(self) -> None:
        """Read the weights anew from where they were first read."""
        self.free_weights(keep_on_host=False)
        self.restore_weights()

    def set_params(self, params: Any) -> None:
        """Use other weights: a tree of the same structure, shapes and dtypes, its layers in any segments; or what
        `jaxllm.flax.to_nnx` made of it.

        Raises:
            ValidationError: it differs; the text names the first difference.
        """
        own = self.model_params
        if own is None:
            raise RuntimeError("the weights sleep: call wake_up() first")
        # where flax is not imported, nobody has anything of it
        if "flax.nnx" in sys.modules:
            from jaxllm.flax import is_nnx, to_params

            if is_nnx(params):
                params = to_params(params, like=own)
        sizes = segment_sizes(own)
        try:
            given = segment_sizes(params)
        except (AttributeError, IndexError, TypeError):  # a tree of another kind
            given = ()
        if sum(given) != sum(sizes):
            given = sizes  # what is wrong is said of ours
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), own)
        expected = jax.eval_shape(functools.partial(resegment, sizes=given), shapes)
        ours, theirs = (dict(jax.tree.leaves_with_path(tree)) for tree in (expected, params))
        _check_names(list(map(jax.tree_util.keystr, ours)), list(map(jax.tree_util.keystr, theirs)))
        for path, old in ours.items():
            new = theirs[path]
            if old.shape != np.shape(new) or old.dtype != new.dtype:
                shown = [f"{x.dtype}{list(np.shape(x))}" for x in (old, new)]
                raise ValidationError(f"params{jax.tree_util.keystr(path)} must be {shown[0]}, got {shown[1]}.")
        params = resegment(params, sizes)
        wanted = without_draft(self._allocator.param_shardings)
        self._check_parts(params, wanted)
        params = jax.device_put(params, wanted)
        if isinstance(self.params, Params):
            params = dataclasses.replace(params, draft=self.params.draft)
        self._use(params, owned=False)

    def _check_parts(self, params: Weights, wanted: Any) -> None:
        """An array that is split has its rows by device: of one that lies elsewhere nobody knows the order."""
        for (path, array), own in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
            # wherever it lies, in the device's memory or in the host's
            lies: Any = getattr(array, "sharding", None)
            if own.is_fully_replicated or (lies is not None and lies.with_memory_kind(own.memory_kind) == own):
                continue
            raise ValidationError(
                f"params{jax.tree_util.keystr(path)} must be split over the engine's {len(own.device_set)} devices as "
                "apply_model shows it: its rows are in the order of the devices. Change the arrays that apply_model "
                "gives, or set tensor_parallel_size=1."
            )

    def _use(self, params: Weights, *, owned: bool) -> None:
        self.params = params
        self._owns_params, self._on_host = owned, None
        self._weights_changed()

    def _delete_params(self, kept: Weights | None = None) -> None:
        if self._owns_params:
            stay = list(map(id, jax.tree.leaves(kept)))
            self._delete([array for array in jax.tree.leaves(self.params) if id(array) not in stay])
        self.params = self._on_host = None
        self._weights_changed()

    @staticmethod
    def _delete(tree: object) -> None:
        for array in jax.tree.leaves(tree):
            if not array.is_deleted():
                array.delete()

    def shutdown(self) -> None:
        """Free every device array; idempotent."""
        self.free_cache()
        self._delete_params()


def host_copies(params: Weights) -> Weights:
    """What `jax.device_put` makes the weights of again: arrays that lie in the host's memory as they are, numpy arrays
    of the others.
    """
    return jax.tree.map(lambda array: array if lies_on_host(array) else jax.device_get(array), params)


def _check_names(ours: list[str], theirs: list[str]) -> None:
    """Raise ValidationError for the first array that the model does not have, or else that was not given."""
    unknown = next((name for name in theirs if name not in ours), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, ours, n=1, cutoff=0.0)
        raise ValidationError(f"params{unknown} is no array of the model's. Did you mean params{''.join(close)}?")
    missing = next((name for name in ours if name not in theirs), None)
    if missing is not None:
        raise ValidationError(f"params{missing} is missing: params must have all arrays that apply_model shows.")
