"""The matrices of a model that can be quantized, and its specs with those that are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight import Part, WeightSpec, is_spec
from jaxllm.layers.weight_storage import Layout, stored

Tree = TypeVar("Tree")

#: the fields of params that a layer's input is multiplied by
FIELDS = ("qkv", "output", "gate_up", "up", "down", "query_up", "shared_gate_up", "shared_down", "head")
#: as those, but small, and left as they are unless a checkpoint has them quantized
SMALL_FIELDS = ("router", "shared_gate")


def matrices(specs: Any) -> Iterator[tuple[str, tuple[int, int], int]]:
    """The name in a checkpoint and the shape [out, in] of each matrix, also of a name that other checkpoints have in
    its place; of experts that are stacked, the shape of one, and how many they are (0: it is one matrix).
    """
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec):
        if _field(path) not in FIELDS:
            continue
        for name, part in spec.tensors():
            yield name, *_shape(spec, part)
            if part.alternative is not None:
                for layer in spec.layers or (0,):
                    yield part.alternative.name.format(layer=layer, expert=0), *_shape(spec, part.alternative)


def _shape(spec: WeightSpec, part: Part) -> tuple[tuple[int, int], int]:
    stacked = spec.experts.units if spec.experts is not None and spec.has_all_experts(part) else 0
    return part.tensor_shape[:2], stacked  # pyright: ignore[reportReturnType]


def quantized(specs: Tree, layout: Callable[[str], Layout | None], *, first_layer: int = 0) -> Tree:
    """A model's specs with the quantized matrices' in the places of the unquantized ones. Runs of layers whose matrices
    lie in the same forms become segments.

    Args:
        layout: of a matrix, by its name; None: it is not quantized.
        first_layer: the model's layer that is the first one of these.

    Raises:
        ValidationError: experts of a layer lie in different forms; the text names the layer. Or a matrix is [in, out]
            in checkpoints, where quantized ones are [out, in].
    """
    tree: Any = specs
    if hasattr(tree, "body"):
        return dataclasses.replace(tree, body=quantized(tree.body, layout, first_layer=first_layer))

    def of_part(part: Part, layer: int, experts: int) -> Layout | None:
        found = {
            (option.name, layout(option.name.format(layer=layer + first_layer, expert=expert)))
            for option in (part, part.alternative)
            if option is not None
            for expert in range(experts if "{expert}" in option.name else 1)
        }
        forms = {form for _, form in found if form is not None}
        if len(forms) > 1 or any((name, None) in found for name, form in found if form is not None):
            raise ValidationError(
                f"The experts of layer {layer + first_layer} are quantized in different ways, which is not supported: "
                "take a checkpoint that quantizes all experts of a layer alike."
            )
        return next(iter(forms), None)

    def forms(spec: WeightSpec, layer: int) -> tuple[Layout | None, ...]:
        experts = 1 if spec.experts is None else spec.experts.units
        found = tuple(of_part(part, layer, experts) for part in spec.parts)
        for part, form in zip(spec.parts, found, strict=True):
            if part.transposed and spec.experts is None and form is not None:
                raise ValidationError(
                    f"quantization of {part.name.format(layer=layer + first_layer)} is not supported: this family's "
                    "checkpoints have its matrices as [in, out], and quantized ones are [out, in]. Leave it out."
                )
        return found

    def run(segment: Any, where: slice) -> Any:
        def one(path: Any, spec: WeightSpec) -> Any:
            cut = spec[where]
            return stored(cut, forms(spec, cut.layers[0])) if _is_matrix(path) else cut  # pyright: ignore

        return jax.tree.map_with_path(one, segment, is_leaf=is_spec)

    segments = []
    for segment in tree.layers:
        leaves = jax.tree.leaves_with_path(segment, is_leaf=is_spec)
        layers = leaves[0][1].layers
        of_layer = [tuple(forms(spec, layer) for path, spec in leaves if _is_matrix(path)) for layer in layers]
        for _, group in itertools.groupby(range(len(layers)), key=lambda i, of_layer=of_layer: of_layer[i]):
            numbers = list(group)
            segments.append(run(segment, slice(numbers[0], numbers[-1] + 1)))
    tables = {name: getattr(tree, name, None) for name in ("embedding", "head")}
    outside = {name: stored(spec, forms(spec, 0)) for name, spec in tables.items() if spec is not None}
    return dataclasses.replace(tree, layers=tuple(segments), **outside)


def _field(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "name", ""))


def _is_matrix(path: tuple[Any, ...]) -> bool:
    return _field(path) in (*FIELDS, *SMALL_FIELDS)
