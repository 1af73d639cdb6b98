"""Which matrices of a model can have adapters, where these lie, and the weights with them.

An adapter's A and B of a matrix are arrays like the weights are: by their axes they are split over devices as the
matrix itself is, A along its inputs and B along its outputs, so that what a device computes is its part of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from jaxllm.layers.adapted import Adapted
from jaxllm.layers.mla import LATENT_MATRICES
from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.decoder import MATRICES

Tree = TypeVar("Tree")
#: of each segment of a model's layers: the field of a matrix -> its A and B, or what stands for them
Stacks = tuple[dict[str, Adapted], ...]


class Place(NamedTuple):
    """Where one tensor of an adapter lies in the stacks: the names that `adapter_specs` give to its parts there."""

    a: str
    b: str
    #: the part in the checkpoint's tensor
    part: Part


class Module(NamedTuple):
    """A matrix of the checkpoint that can have an adapter."""

    out_features: int
    in_features: int
    #: several where the checkpoint's tensor is several parts of a joined matrix
    places: tuple[Place, ...]


def adapter_specs(specs: Any, *, rank: int, slots: int | None, own: Callable[[Axis], int]) -> Stacks:
    """Specs of the stacks.

    Args:
        specs: of the model, none of it quantized.
        rank: of each part, at most.
        slots: adapters; None: of one by itself, without an axis for slots.
        own: how many numbers of an axis a device has.
    """
    experts = None if slots is None else Axis("slots", slots)

    def one(spec: WeightSpec) -> Adapted:
        a, b = [], []
        for index, part in enumerate(spec.parts):
            rows, columns = part.axes
            names = _names(part, index)
            a.append(Part(names[0], (Axis("rank", rank), columns)))
            b.append(Part(names[1], (rows, Axis("rank", rank))))
        return Adapted(
            a=WeightSpec(parts=tuple(a), layers=spec.layers, experts=experts),
            b=WeightSpec(parts=tuple(b), layers=spec.layers, experts=experts, columns_first=True),
            parts=tuple(own(part.axes[0]) for part in spec.parts),
        )

    return tuple({field: one(spec) for field, spec in adapted_matrices(segment)} for segment in _layers(specs))


def adapter_modules(specs: Any, *, first_layer: int = 0) -> dict[str, Module]:
    """The matrices that can have adapters, by their names in the checkpoint without ``.weight``.

    Args:
        specs: as in `adapter_specs`.
        first_layer: the model's layer that is the first one of these.
    """
    found: dict[str, list[tuple[Part, Place]]] = {}
    for segment in _layers(specs):
        for _, spec in adapted_matrices(segment):
            for layer in spec.layers or ():
                for index, part in enumerate(spec.parts):
                    a, b = (name.format(layer=layer) for name in _names(part, index))
                    name = part.name.format(layer=layer + first_layer).removesuffix(".weight")
                    place = Place(a, b, part)
                    found.setdefault(name, []).append((part, place))
    return {
        name: Module(*parts[0][0].tensor_shape, tuple(place for _, place in parts))  # pyright: ignore[reportCallIssue]
        for name, parts in found.items()
    }


def with_adapters(params: Tree, stacks: Stacks) -> Tree:
    """A model's weights with adapters beside their matrices, in the same memory.

    Args:
        params: in any of the forms that programs take them in.
        stacks: arrays as `adapter_specs` say, or their shapes.
    """
    tree: Any = params
    if hasattr(tree, "body"):
        return dataclasses.replace(tree, body=with_adapters(tree.body, stacks))
    layers = tuple(_with_own(segment, own) for segment, own in zip(tree.layers, stacks, strict=True))
    return dataclasses.replace(tree, layers=layers)


def _with_own(segment: Any, own: dict[str, Adapted]) -> Any:
    plain = {
        name: dataclasses.replace(pair, base=getattr(segment, name)) for name, pair in own.items() if "." not in name
    }
    nested: dict[str, Any] = {}
    for name, pair in own.items():
        if "." in name:
            outer, _, field = name.partition(".")
            holder = nested.get(outer, getattr(segment, outer))
            nested[outer] = dataclasses.replace(
                holder, **{field: dataclasses.replace(pair, base=getattr(holder, field))}
            )
    return dataclasses.replace(segment, **plain, **nested)


def _layers(specs: Any) -> tuple[Any, ...]:
    return getattr(specs, "body", specs).layers


def adapted_matrices(segment: Any) -> Iterator[tuple[str, WeightSpec]]:
    """The matrices of a segment that can have adapters, each by the field that has it."""
    for name in MATRICES:
        if getattr(segment, name) is not None:
            yield name, getattr(segment, name)
    if segment.latents is not None:
        for name in LATENT_MATRICES:
            yield f"latents.{name}", getattr(segment.latents, name)


def _names(part: Part, index: int) -> tuple[str, str]:
    """Of A and B, with ``{layer}``; a tensor may be several parts."""
    return f"{part.name}|{index}|A", f"{part.name}|{index}|B"
