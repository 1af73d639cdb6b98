"""Pipeline stages: which layers each has, and what its part of a model is.

A stage is a smaller model: its layers, its part of each group of layers that share a block table, and of the weights
outside of layers the embedding and the tower that sees (the first stage) or what makes logits (the last one). Where
embedding and head are one matrix, both have it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.weight import is_spec
from jaxllm.models.segments import segment_sizes

#: what the first stage has outside of layers
FIRST = ("embedding", "position_embedding", "embedding_norm", "embedding_norm_bias", "vision")

Model = TypeVar("Model")
#: `Params`, their shapes or their specs
Tree = TypeVar("Tree")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Neighbouring layers of a model, on devices of their own."""

    index: int
    #: stages of the pipeline
    count: int
    #: its first layer, and the one behind its last
    first: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def num_layers(self) -> int:
        return self.stop - self.first


def pipeline(num_layers: int, count: int, layers: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """The stages of a model; () where there is but one.

    Args:
        layers: of each stage (`pipeline_layer_partition`); None: as equally as it goes. What is left over goes to the
            stages before the last one, from behind (vLLM's `get_pp_indices`): the last one has the head besides.

    Raises:
        ValidationError: there are more stages than layers, or `layers` are of another model.
    """
    if count > num_layers:
        raise ValidationError(
            f"pipeline_parallel_size={count}: each stage has at least one of the model's {num_layers} layers. Set "
            f"pipeline_parallel_size <= {num_layers}."
        )
    each, left = divmod(num_layers, count)
    even = [each + (count - 1 - left <= index < count - 1) for index in range(count)]
    sizes = list(layers or even)
    if len(sizes) != count or sum(sizes) != num_layers:
        raise ValidationError(
            f"pipeline_layer_partition={','.join(map(str, sizes))} has {len(sizes)} stages of {sum(sizes)} layers in "
            f"all; pipeline_parallel_size={count} and the model's {num_layers} layers need as many. What would work: "
            f"{','.join(map(str, even))}."
        )
    if count == 1:
        return ()
    bounds = itertools.pairwise((0, *itertools.accumulate(sizes)))
    return tuple(Stage(index=index, count=count, first=first, stop=stop) for index, (first, stop) in enumerate(bounds))


def stage_model(model: Model, stage: Stage) -> Model:
    """A model's configuration with the stage's layers only."""
    fields: Any = dataclasses.fields(model)  # pyright: ignore[reportArgumentType]
    # by their names, those that have one entry a layer
    by_layer = {name: getattr(model, name) for field in fields if (name := field.name).startswith("layer_")}
    cut = {name: each[stage.first : stage.stop] for name, each in by_layer.items() if isinstance(each, tuple)}
    # the first one puts what pictures become in the place of tokens
    tower = {} if stage.is_first or not hasattr(model, "vision") else {"vision": None}
    return dataclasses.replace(model, num_layers=stage.num_layers, **cut, **tower)  # pyright: ignore


def stage_groups(groups: tuple[KVCacheGroup, ...], stage: Stage) -> tuple[KVCacheGroup, ...]:
    """The stage's layers of each group, by their number in the stage. All groups stay, some perhaps empty: block tables
    are those of all stages.
    """
    layers = range(stage.first, stage.stop)
    return tuple(
        dataclasses.replace(group, layers=tuple(layers.index(layer) for layer in group.layers if layer in layers))
        for group in groups
    )


def with_ends(params: Tree, stage: Stage, head: Any = None) -> Tree:
    """Params with a stage's layers, without what other stages have outside of layers.

    Args:
        head: of the last stage where the model has none of its own; None: its embedding.
    """
    tree: Any = params
    own = tree.head if tree.head is not None else tree.embedding if head is None else head
    ends = {field.name: None for field in dataclasses.fields(tree) if field.name not in (*FIRST, "layers", "head")}
    return dataclasses.replace(
        tree,
        **{name: getattr(tree, name) if stage.is_first else None for name in FIRST if hasattr(tree, name)},
        head=own if stage.is_last else None,
        **({} if stage.is_last else ends),
    )


def stage_params(params: Tree, stage: Stage, head: Any = None) -> Tree:
    """A stage's part of a model's params, whose segments do not go on behind the end of a stage.

    Args:
        head: see `with_ends`.
    """
    tree: Any = params
    firsts = itertools.accumulate(segment_sizes(tree), initial=0)
    own = (segment for segment, first in zip(tree.layers, firsts, strict=False) if stage.first <= first < stage.stop)
    return with_ends(dataclasses.replace(tree, layers=tuple(own)), stage, head)


def of_each_array(specs: Any, stages: Sequence[Stage], values: Sequence[Value]) -> Any:
    """The value of its stage for each array of a model, a tree of the form of `specs`; of an array that two stages
    have, the first one's.
    """

    def fill(tree: Any, value: Value) -> Any:
        return jax.tree.map(lambda _: value, tree, is_leaf=is_spec)

    firsts = itertools.accumulate(segment_sizes(specs)[:-1], initial=0)
    numbers = [next(s.index for s in stages if s.first <= first < s.stop) for first in firsts]
    rest = [field.name for field in dataclasses.fields(specs) if field.name != "layers"]
    return dataclasses.replace(
        specs,
        layers=tuple(fill(segment, values[i]) for segment, i in zip(specs.layers, numbers, strict=True)),
        **{name: fill(getattr(specs, name), values[0 if name in FIRST else -1]) for name in rest},
    )
