"""Which matrices of a model can have adapters, where these lie, and the weights with them.

An adapter's A and B of a matrix are arrays like the weights are: by their axes they are split over devices as the
matrix itself is, A along its inputs and B along its outputs, so that what a device computes is its part of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.layers.adapted import Adapted, WholeAdapters
from jaxllm.layers.adapter_tables import AdapterTables
from jaxllm.layers.mla import LATENT_MATRICES
from jaxllm.layers.weight import Axis, Part, WeightSpec
from jaxllm.models.params import MATRICES
from pallas_kernels.backend import Backend
from pallas_kernels.lora_matmul.cpu_ffi import has_kernel

Tree = TypeVar("Tree")
#: names of what tables are read by
EMBEDDING, HEAD, OWNED = "embedding|table", "head|table", "tables|owned"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacks:
    """All adapters that a device has, or what stands for them."""

    #: of each segment of a model's layers: the field of a matrix -> its A and B
    layers: tuple[dict[str, Adapted], ...]
    #: None: adapters have no embedding and no head of their own
    tables: AdapterTables | None = None


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


class Table(NamedTuple):
    """The model's embedding, or its head, of which adapters may have their own."""

    #: `EMBEDDING` or `HEAD`
    kind: str
    #: (tokens, hidden size)
    shape: tuple[int, int]


def adapter_specs(
    specs: Any, *, rank: int, slots: int | None, own: Callable[[Axis], int], tables: str | None = None
) -> Stacks:
    """Specs of the stacks.

    Args:
        specs: of the model, none of it quantized.
        rank: of each part, at most.
        slots: adapters; None: of one by itself, without an axis for slots.
        own: how many numbers of an axis a device has.
        tables: the dtype of embeddings and heads; None: adapters have none of their own.
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

    def table(kind: str, spec: WeightSpec) -> WeightSpec:
        return WeightSpec(parts=(Part(kind, spec.parts[0].axes),), experts=experts, dtype=tables)

    layers = tuple({field: one(spec) for field, spec in adapted_matrices(segment)} for segment in _layers(specs))
    # every stage of a pipeline says which it would be, so that all steps have one form
    found = {kind: table(kind, spec) for kind, spec in _tables(specs).items()}
    if tables is None:
        return Stacks(layers)
    owned = WeightSpec(parts=(Part(OWNED, (Axis("tables", 2),)),), experts=experts, dtype="int32")
    return Stacks(layers, AdapterTables(embedding=found.get(EMBEDDING), head=found.get(HEAD), owned=owned))


def _tables(specs: Any) -> dict[str, WeightSpec]:
    """What the model has of an embedding and a head; tied, they are the same."""
    body = getattr(specs, "body", specs)
    head = body.embedding if body.head is None else body.head
    # what has logits has the last norm
    makes_logits = body is specs and body.norm is not None
    found = {EMBEDDING: body.embedding, HEAD: head if makes_logits else None}
    return {kind: spec for kind, spec in found.items() if spec is not None}


def adapter_tables(specs: Any, *, head: str) -> dict[str, Table]:
    """The tables that adapters can have, by their names in the checkpoint without ``.weight``.

    Args:
        specs: as in `adapter_specs`, of a whole model.
        head: what the head is called, also where it is the embedding.
    """
    found = {}
    for kind, spec in _tables(specs).items():
        (part,) = spec.parts
        name = head if kind == HEAD else part.name.removesuffix(".weight")
        found[name] = Table(kind, part.shape)  # pyright: ignore[reportArgumentType]
    return found


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
    layers = tuple(_with_own(segment, own) for segment, own in zip(tree.layers, stacks.layers, strict=True))
    return dataclasses.replace(tree, layers=layers, tables=stacks.tables)


def with_own_heads(params: Tree, stacks: Stacks | None) -> Tree:
    """What samplers take of a model's weights, with the heads that adapters have, if they can have any."""
    if stacks is None or stacks.tables is None or stacks.tables.head is None:
        return params
    tree: Any = params
    return dataclasses.replace(tree, tables=dataclasses.replace(stacks.tables, embedding=None))


def with_slots(params: Tree, slots: jax.Array, backend: Backend) -> Tree:
    """Weights whose adapters know each token's slot, i32 [T]; those that have a kernel are `WholeAdapters`."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, AdapterTables):
            return dataclasses.replace(leaf, slots=slots)
        if not isinstance(leaf, Adapted):
            return leaf
        if has_kernel(backend.cpu_adapters, leaf.a, leaf.parts):
            return dataclasses.replace(leaf, a=WholeAdapters(a=leaf.a, b=leaf.b, slots=slots), b=None)
        return dataclasses.replace(leaf, slots=jnp.broadcast_to(slots, (leaf.a.shape[0], *slots.shape)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted | AdapterTables))


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
