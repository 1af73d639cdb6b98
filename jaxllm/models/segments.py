"""The layers of a model as segments: each a tree of weights of equal layers, stacked on the first axis of every array.

A segment of several layers is scanned, so that compiling takes the same time however many there are; a segment of one
is launched by itself. XLA:GPU hands weights to cuBLAS as whole buffers, so a scan copies each layer's out of the stack
first: three times the traffic of a step that reads its weights once. There every layer is a segment. XLA:CPU copies
them too, but out of its caches and beside the rest of a layer, and a program of single layers takes three times as long
to compile: there a run of equal layers is one segment. Where layers of a model differ in kind, each run of equal ones
has segments of its own; a pipeline stage is a slice of the tuple.

How many layers the segments of an engine have is decided in `runner.compile.target.Target.segments`.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.adapted import WholeAdapters
from jaxllm.layers.moe import Experts
from jaxllm.layers.stacked_matrix import StackedMatrix
from jaxllm.layers.weight import is_spec
from jaxllm.models.offloaded import fetch, lies_on_host

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
    for segment in segments:
        if lies_on_host(segment):
            segment = coming
            if elsewhere:
                coming, carry = fetch(elsewhere.pop(0), carry)
        last = first + _num_layers(segment)
        here = jax.tree.map(lambda array, first=first, last=last: array[first:last], places)
        leaves = jax.tree.leaves(segment, is_leaf=_is_whole)
        if last - first == 1 and not any(isinstance(leaf, (StackedMatrix, WholeAdapters)) for leaf in leaves):
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
