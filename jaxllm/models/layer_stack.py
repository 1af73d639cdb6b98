"""The layers of a model, in either of two forms.

Stacked: one tree of weights, every array with the layers on its first axis; scanned, so that compiling takes the same
time however many layers there are. Separate: a tuple of such trees, one a layer, each array without that axis; every
layer is launched by itself. XLA:GPU hands weights to cuBLAS as whole buffers, so a scan copies each layer's out of the
stack first: three times the traffic of a step that reads its weights once. XLA:CPU copies them too, but out of
its caches and beside the rest of a layer, and a program of separate layers takes three times as long to compile.

Which form an engine has is decided in `runner.target.Target.stacks_layers`; files hold the stacked one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.stacked_matrix import StackedMatrix

Carry = TypeVar("Carry")
#: a model's weights, their shapes or their sources
Tree = TypeVar("Tree")


def through_layers(layer: Callable[[Carry, Any, Any], Carry], carry: Carry, layers: Any, places: Any) -> Carry:
    """``carry = layer(carry, weights, place)``, one layer after the other.

    Args:
        layers: the weights, in either form. A `StackedMatrix` among stacked ones stays whole, and knows its layer.
        places: a tree of numpy arrays [L, ...], what else differs from layer to layer; `layer` gets its part.
    """
    if not isinstance(layers, tuple):
        leaves, tree = jax.tree.flatten(layers, is_leaf=_is_whole)
        whole = [leaf if _is_whole(leaf) else None for leaf in leaves]

        def scanned(carry: Carry, each: Any) -> tuple[Carry, None]:
            i, own, place = each
            own = [part if leaf is None else leaf.of_layer(i) for leaf, part in zip(whole, own, strict=True)]
            return layer(carry, tree.unflatten(own), place), None

        split = [None if _is_whole(leaf) else leaf for leaf in leaves]
        num_layers = len(jax.tree.leaves(places)[0])
        return lax.scan(scanned, carry, (jnp.arange(num_layers, dtype=jnp.int32), split, places))[0]
    # traced once for all layers of the same shapes; XLA puts the calls' bodies in their place
    call = jax.jit(layer)
    for i, weights in enumerate(layers):
        carry = call(carry, weights, jax.tree.map(lambda array, i=i: array[i], places))
    return carry


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, StackedMatrix)


def separate(layers: Tree, num_layers: int, one: Callable[[Any, int], Any]) -> tuple[Tree, ...]:
    """A tree for each layer: `one` makes the leaf of the i-th layer of a stacked leaf."""
    return tuple(jax.tree.map(lambda leaf, i=i: one(leaf, i), layers) for i in range(num_layers))


def has_separate_layers(params: Any) -> bool:
    """Of a model's params, or of what has them as its `body`."""
    return isinstance(getattr(getattr(params, "body", params), "layers", None), tuple)


def in_form(params: Tree, *, separated: bool) -> Tree:
    """A model's weights with their layers in one form or the other; those that are in it already are returned.

    Args:
        params: the params of a model, or what has them as its `body`.

    Returns:
        New arrays for the layers, beside the old ones.
    """
    if has_separate_layers(params) == separated:
        return params
    tree: Any = params
    if hasattr(tree, "body"):
        return dataclasses.replace(tree, body=in_form(tree.body, separated=separated))
    if separated:
        num_layers = len(jax.tree.leaves(tree.layers)[0])
        return dataclasses.replace(tree, layers=separate(tree.layers, num_layers, lambda array, i: array[i]))
    return dataclasses.replace(tree, layers=jax.tree.map(lambda *arrays: jnp.stack(arrays), *tree.layers))
