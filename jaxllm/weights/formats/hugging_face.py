"""A model's weights as Hugging Face has them: safetensors under its tensor names, in shards when they are large."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.layers.weight import Part, WeightSpec, is_spec
from jaxllm.models.offloaded import lies_on_host
from jaxllm.weights.formats.shards import ShardWriter
from jaxllm.weights.whole import gather_tensor, is_split

#: of one file, unless a single tensor is larger; what transformers 4 takes
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint, and where it lies in the model's arrays."""

    name: str
    spec: WeightSpec
    array: jax.Array
    #: what it is made of, each with its place in the whole array: a layer, if layers are stacked in it, and rows
    places: tuple[tuple[Part, tuple[int | slice, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.tensor_shape(self.places[0][0])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.array.dtype.itemsize

    def value(self) -> np.ndarray:
        """The numbers: the model's own memory on a CPU, a copy in the host's elsewhere and of parts that are joined."""
        if len(self.places) == 1 and not self.places[0][0].transposed:
            return self._part(*self.places[0]).reshape(self.shape)
        whole = np.empty(self.shape, self.array.dtype)
        for part, index in self.places:
            matrix = whole[index[-2]] if self.spec.has_all_experts(part) else whole
            span, ours = part.in_tensor(0, part.shape[0])
            (matrix.T if part.transposed else matrix)[span][ours] = self._part(part, index)
        return whole

    def _part(self, part: Part, index: tuple[int | slice, ...]) -> np.ndarray:
        array = self.array
        if is_split(self.spec, array.sharding):
            return gather_tensor(self.spec, array, part, index)
        on_cpu = all(device.platform == "cpu" for device in array.sharding.device_set)
        if lies_on_host(array) or (on_cpu and len(array.sharding.device_set) == 1):
            own = np.asarray(array)[index]
            return np.ascontiguousarray(own.T if self.spec.columns_first else own)
        own = array[index].T if self.spec.columns_first else array[index]
        # an array keeps what numpy has seen of it, and the model's must not keep a copy on the host
        return np.ascontiguousarray(own.copy() if own is array else own)


def tensors(specs: Any, params: Any) -> Iterator[Tensor]:
    """Every tensor of a checkpoint that `params` would be read from: parts of an array apart, or joined as the
    checkpoint joins them, stacked layers each by itself.

    Args:
        specs: what each array of `params` is, a tree of `WeightSpec`s of the same form.
    """
    for spec, array in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True):
        for name, places in itertools.groupby(spec.places(), key=operator.itemgetter(0)):
            yield Tensor(name=name, spec=spec, array=array, places=tuple(place[1:] for place in places))


def write(directory: Path, found: Sequence[Tensor]) -> None:
    """Write model.safetensors, or shards of about `SHARD_BYTES` and their index, into a directory that exists.

    On a CPU nothing is copied; elsewhere one shard at a time is in the host's memory.

    Raises:
        WeightsError: there is no room for them, or the system cannot write.
    """
    writer = ShardWriter(directory, sum(tensor.nbytes for tensor in found))
    for shard in _shards(found):
        writer.write({tensor.name: tensor.value() for tensor in shard})
    writer.close()


def _shards(found: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in found:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
