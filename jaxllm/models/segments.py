"""The layers of a model as segments: each a tree of weights of equal layers, stacked on the first axis of every array.

A segment of several layers is scanned, so that compiling takes the same time however many there are; a segment of one
is launched by itself. XLA:GPU hands weights to cuBLAS as whole buffers, so a scan copies each layer's out of the stack
first: three times the traffic of a step that reads its weights once. There every layer is a segment. XLA:CPU copies
them too, but out of its caches and beside the rest of a layer, and a program of single layers takes three times as long
to compile: there a run of equal layers is one segment. Where layers of a model differ in kind, each run of equal ones
has segments of its own; a pipeline stage is a slice of the tuple. Segments that differ only in the forms of matrices
that are read where they lie are scanned together, as the many short ones of a GGUF file of several types are: a layer's
product is then one of as many as there are segments (`layers.stacked_matrix.OneOfStacks`).

How many layers the segments of an engine have is decided in `runner.compile.target.Target.segments`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.layers.adapted import WholeAdapters
from jaxllm.layers.moe import Experts
from jaxllm.layers.stacked_matrix import OneOfStacks, StackedMatrix
from jaxllm.layers.weight import is_spec
from jaxllm.models.offloaded import fetch, lies_on_host
from pallas_kernels.quantized import is_quantized

Carry = TypeVar("Carry")
#: a model's weights, their shapes or their specs
Tree = TypeVar("Tree")


def through_layers(
    layer: Callable[[Carry, Any, Any], Carry], carry: Carry, segments: Sequence[Any], places: Any
) -> Carry:
    """``carry = layer(carry, weights, place)``, one layer after the other.

    Args:
        segments: the weights. A `StackedMatrix` among them stays whole, and knows its layer; so do `Experts` and
            `WholeAdapters`. Those that lie in the host's memory are copied ahead (`models.offloaded`).
        places: a tree of numpy arrays [L, ...], what else differs from layer to layer; `layer` gets its part.
    """
    # traced once for all layers of the same shapes; XLA puts the calls' bodies in their place
    call, first = jax.jit(layer), 0
    elsewhere = [segment for segment in segments if lies_on_host(segment)]
    coming: Any = None
    if elsewhere:
        coming, carry = fetch(elsewhere.pop(0), carry)
    for _, run in itertools.groupby(segments, _kind):
        segment, *others = run
        if lies_on_host(segment):
            segment = coming
            if elsewhere:
                coming, carry = fetch(elsewhere.pop(0), carry)
        last = first + sum(map(_num_layers, (segment, *others)))
        here = jax.tree.map(lambda array, first=first, last=last: array[first:last], places)
        leaves = jax.tree.leaves(segment, is_leaf=_is_whole)
        if others:
            carry = _scan_together(layer, carry, (segment, *others), here)
        elif last - first == 1 and not any(isinstance(leaf, (StackedMatrix, WholeAdapters)) for leaf in leaves):
            # a reshape is no copy, as a slice would be
            single = jax.tree.map(lambda array: array.reshape(array.shape[1:]), segment)
            carry = call(carry, single, jax.tree.map(lambda array: array[0], here))
        else:
            carry = _scan(layer, carry, segment, here, last - first)
        first = last
    return carry


def _scan(layer: Callable[[Carry, Any, Any], Carry], carry: Carry, segment: Any, places: Any, num_layers: int) -> Carry:
    leaves, tree = jax.tree.flatten(segment, is_leaf=_is_whole)
    whole = [leaf if _is_whole(leaf) else None for leaf in leaves]

    def scanned(carry: Carry, each: Any) -> tuple[Carry, None]:
        i, own, place = each
        own = [part if leaf is None else leaf.of_layer(i) for leaf, part in zip(whole, own, strict=True)]
        return layer(carry, tree.unflatten(own), place), None

    split = [None if _is_whole(leaf) else leaf for leaf in leaves]
    return lax.scan(scanned, carry, (jnp.arange(num_layers, dtype=jnp.int32), split, places))[0]


def _scan_together(
    layer: Callable[[Carry, Any, Any], Carry], carry: Carry, segments: Sequence[Any], places: Any
) -> Carry:
    """`_scan` of segments of one `_kind`."""
    flat, (tree, *_) = zip(*(jax.tree.flatten(segment, is_leaf=_is_matrix) for segment in segments), strict=True)
    columns = list(zip(*flat, strict=True))
    sizes = list(map(_num_layers, segments))
    which = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    numbers = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])

    def scanned(carry: Carry, each: Any) -> tuple[Carry, None]:
        which, number, own, place = each
        of_layer = functools.partial(jax.tree.map, lambda matrix: matrix.of_layer(number), is_leaf=_is_stack)
        own = [
            OneOfStacks(tuple(map(of_layer, column)), which) if part is None else part
            for column, part in zip(columns, own, strict=True)
        ]
        return layer(carry, tree.unflatten(own), place), None

    # what is no matrix is small enough to be put together in every step
    split = [None if _is_matrix(column[0]) else jnp.concatenate(column) for column in columns]
    return lax.scan(scanned, carry, (which, numbers, split, places))[0]


def _kind(segment: Any) -> Any:
    """Equal for segments that can be scanned together: what they have but matrices is alike, and all of these are read
    where they lie.
    """
    leaves, tree = jax.tree.flatten(segment, is_leaf=lambda leaf: _is_matrix(leaf) or _is_whole(leaf))
    matrices = list(filter(_is_matrix, leaves))
    alone = not matrices or not all(map(_is_stack, jax.tree.leaves(matrices, is_leaf=_is_stack)))
    if alone or any(isinstance(leaf, (Experts, WholeAdapters)) for leaf in leaves) or lies_on_host(segment):
        return object()
    return tree, tuple(_out_and_in(leaf) if _is_matrix(leaf) else (leaf.shape[1:], leaf.dtype) for leaf in leaves)


def _out_and_in(matrix: Any) -> tuple[int, int]:
    """Of one layer. What a matrix is joined of has the same in-features."""
    shapes = [leaf.stored.shape for leaf in jax.tree.leaves(matrix, is_leaf=_is_stack)]
    return sum(shape[-2] for shape in shapes), shapes[0][-1]


def _is_stack(leaf: Any) -> bool:
    return isinstance(leaf, StackedMatrix)


def _is_matrix(leaf: Any) -> bool:
    return _is_stack(leaf) or is_quantized(leaf)


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, (StackedMatrix, Experts, WholeAdapters))


def _num_layers(segment: Any) -> int:
    return jax.tree.leaves(segment, is_leaf=is_spec)[0].shape[0]


def segment_sizes(params: Any) -> tuple[int, ...]:
    """Layers of each segment of a model's params, or of what has them as its `body`."""
    return tuple(map(_num_layers, getattr(params, "body", params).layers))


def resegment(params: Tree, sizes: tuple[int, ...]) -> Tree:
    """A model's params with segments of other sizes; those that have these sizes already are returned.

    Args:
        params: the params of a model, or what has them as its `body`: arrays, or specs that are only cut.
        sizes: layers of each segment, as many in all as there are. Layers of different kinds do not share one.

    Returns:
        New arrays for the segments that change, beside the old ones.
    """
    if segment_sizes(params) == sizes:
        return params
    tree: Any = params
    if hasattr(tree, "body"):
        return dataclasses.replace(tree, body=resegment(tree.body, sizes))
    assert sum(sizes) == sum(segment_sizes(params)), (sizes, segment_sizes(params))
    given = _bounds(segment_sizes(params))
    return dataclasses.replace(
        tree, layers=tuple(_layers(tree.layers, given, start, stop) for start, stop in _bounds(sizes))
    )


def cut(sizes: tuple[int, ...], stops: Sequence[int]) -> tuple[int, ...]:
    """The sizes of segments none of which goes on behind layers that end at one of `stops`."""
    bounds = sorted({0, *itertools.accumulate(sizes), *stops})
    return tuple(stop - start for start, stop in itertools.pairwise(bounds))


def _bounds(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """The first layer of each segment, and the one behind its last."""
    return list(itertools.pairwise((0, *itertools.accumulate(sizes))))


def _layers(segments: Sequence[Any], bounds: list[tuple[int, int]], start: int, stop: int) -> Any:
    """One segment of the layers from `start` to before `stop`."""
    if (start, stop) in bounds:
        return segments[bounds.index((start, stop))]
    parts = [
        jax.tree.map(operator.itemgetter(slice(max(start - first, 0), stop - first)), segment, is_leaf=is_spec)
        for segment, (first, last) in zip(segments, bounds, strict=True)
        if start < last and first < stop
    ]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
