"""Which logical axes of weights are split over the devices, and what one device's part of a model is.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): attention by heads, the MLP by its intermediate size, so that
a layer needs two all-reduces; the embedding and the head by the vocabulary. KV heads fewer than devices are repeated:
neighbouring devices hold the same one.

Experts are split as an MLP is, each of them; or, with `enable_expert_parallel`, spread as wholes (`layers.moe`). Either
way a device computes a part of what they add, for all tokens, and one sum adds the parts up. Copies of the model that
step together have the experts between them, and tokens of their own.

An array whose rows are several tensors (queries, keys and values; gate and up) has them by device: the first device's
part of each, then the second's. So a device's part is one piece of the array, and computes as a smaller model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight import Axis, WeightSpec, is_spec
from jaxllm.layers.weight_storage import MARK
from jaxllm.models.bert import BertConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.model import ModelConfig
from jaxllm.parallel.mesh import DATA, TENSOR
from pallas_kernels.quantized import Reordered

Tree = TypeVar("Tree")
Model = TypeVar("Model", DecoderConfig, BertConfig)


class Rule(NamedTuple):
    """How a logical axis is split over axes of the mesh, the outermost first; over those that a mesh has."""

    mesh_axes: tuple[str, ...]
    #: where the devices do not divide it: the model is refused, zeros fill it up, or devices share a unit
    remainder: Literal["refuse", "fill", "repeat"]


#: by the logical axis; every device has the others whole
RULES = {
    "heads": Rule((TENSOR,), "refuse"),
    "kv_heads": Rule((TENSOR,), "repeat"),
    "mlp": Rule((TENSOR,), "refuse"),
    "experts": Rule((DATA, TENSOR), "refuse"),
    "vocab": Rule((TENSOR,), "fill"),
    # of no weight: what copies of the model that step together compute
    "tokens": Rule((DATA,), "refuse"),
}
#: the KV cache [pages, 2 * kv_heads, block_size, head_dim]: each device has the keys and the values of its heads
CACHE = jax.P(None, TENSOR)
#: an axis of a mesh, or several as one, the outermost first
MeshAxis = str | tuple[str, ...]


class Held(NamedTuple):
    """What a device has of an axis: `count` numbers from `first` on, and zeros behind them, `size` in all."""

    first: int
    count: int
    size: int


def held(axis: Axis, sizes: Mapping[str, int], numbers: Mapping[str, int] = MappingProxyType({})) -> Held:
    """What a device has of an axis that can be split so.

    Args:
        sizes: of the mesh's axes (`jax.sharding.Mesh.shape`); those that it lacks are 1.
        numbers: of the device along the mesh's axes; those that are missing are 0.
    """
    rule = RULES.get(axis.name)
    devices = 1 if rule is None else math.prod(sizes.get(name, 1) for name in rule.mesh_axes)
    if rule is None or devices == 1:
        return Held(0, axis.size, axis.size)
    number = 0
    for name in rule.mesh_axes:
        number = number * sizes.get(name, 1) + numbers.get(name, 0)
    if rule.remainder == "repeat" and axis.units < devices:
        return Held(number * axis.units // devices * axis.width, axis.width, axis.width)
    units = -(-axis.units // devices)
    first = min(number * units, axis.units)
    return Held(first * axis.width, min(units, axis.units - first) * axis.width, units * axis.width)


def local_shape(spec: WeightSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Of one device's part of an array, on a mesh of these sizes."""
    leading = () if spec.layers is None else (len(spec.layers),)
    return (*leading, *(sum(held(axis, sizes).size for axis in joined) for joined in spec.axes))


def mesh_axes(spec: WeightSpec, sizes: Mapping[str, int]) -> tuple[MeshAxis | None, ...]:
    """The mesh axis that each axis of an array is split over; None: every device has it whole."""
    leading = () if spec.layers is None else (None,)
    return (*leading, *(_mesh_axis(joined[0].name, sizes) for joined in spec.axes))


def _mesh_axis(name: str, sizes: Mapping[str, int]) -> MeshAxis | None:
    """What a logical axis is split over on a mesh of these sizes."""
    rule = RULES.get(name)
    found = tuple(name for name in rule.mesh_axes if sizes.get(name, 1) > 1) if rule else ()
    return (found[0] if len(found) == 1 else found) or None


def axis_sizes(axis: MeshAxis | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of each axis of a mesh that is split over, outermost first."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return {name: sizes[name] for name in names}


def mesh_sizes(sharding: jax.sharding.Sharding | None) -> Mapping[str, int]:
    """Of the mesh that a sharding is of; {} for a single device."""
    return dict(sharding.mesh.shape) if isinstance(sharding, jax.sharding.NamedSharding) else {}


def place_on_mesh(spec: WeightSpec, sharding: jax.sharding.Sharding, index: tuple[slice, ...] | None) -> dict[str, int]:
    """The device whose part has this index in an array: its number along each axis of the mesh that the array is split
    over.

    Args:
        sharding: of what every device has whole, or of the array.
    """
    sizes = mesh_sizes(sharding)
    numbers: dict[str, int] = {}
    for axis, place, size in zip(mesh_axes(spec, sizes), index or (), local_shape(spec, sizes), strict=False):
        number = (place.start or 0) // size
        for name, devices in reversed(axis_sizes(axis, sizes).items()):
            number, numbers[name] = divmod(number, devices)
    return numbers


def shape_and_sharding(
    spec: WeightSpec, sharding: jax.sharding.Sharding | None
) -> tuple[tuple[int, ...], jax.sharding.Sharding | None]:
    """Of an array, all its devices' parts together.

    Args:
        sharding: of what every device has whole.
    """
    sizes = mesh_sizes(sharding)
    shape, names = local_shape(spec, sizes), mesh_axes(spec, sizes)
    if not any(names):
        return shape, sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    whole = tuple(n * math.prod(axis_sizes(name, sizes).values()) for n, name in zip(shape, names, strict=True))
    return whole, sharding.update(spec=jax.P(*names))


def each_sharding(specs: Any, sharding: Any) -> Any:
    """The sharding of what every device has whole, for each array: a tree of them is returned, one is repeated."""
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        return sharding
    return jax.tree.map(lambda _: sharding, specs, is_leaf=is_spec)


def shapes(specs: Tree, dtype: jnp.dtype, sharding: Any) -> Tree:
    """`jax.ShapeDtypeStruct`s of a model's arrays, with their shardings.

    Args:
        specs: a tree of `WeightSpec`s.
        dtype: of those that have none of their own.
        sharding: of what every device has whole, or a tree of them (`each_sharding`); None: one device, of which
            nothing is known.
    """

    def one(spec: WeightSpec, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
        shape, own = shape_and_sharding(spec, sharding)
        return jax.ShapeDtypeStruct(shape, spec.dtype or dtype, sharding=own)

    if sharding is None:
        return jax.tree.map(lambda spec: one(spec, None), specs, is_leaf=is_spec)
    return jax.tree.map(one, specs, each_sharding(specs, sharding), is_leaf=is_spec)


def device_bytes(specs: Any, dtype: jnp.dtype, sizes: Mapping[str, int]) -> int:
    """What one device of a mesh of these sizes has of a model's arrays."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return sum(math.prod(local_shape(spec, sizes)) * jnp.dtype(spec.dtype or dtype).itemsize for spec in leaves)


def spread_experts(model: ModelConfig) -> ModelConfig:
    """The model with its experts over devices as wholes (`enable_expert_parallel`).

    Raises:
        ValidationError: it has none.
    """
    if not isinstance(model, DecoderConfig) or model.moe is None:
        raise ValidationError("enable_expert_parallel=True, and the model has no experts. Leave it out.")
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_parallel=True))


def expert_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that have experts."""
    layers = model.layer_moe if isinstance(model, DecoderConfig) and model.moe is not None else ()
    return tuple(number for number, sparse in enumerate(layers) if sparse)


def cache_axes(model: ModelConfig, *, replicas: int = 1) -> jax.P:
    """How a model's KV cache is split: `CACHE`; latents, which all heads read, not at all.

    Args:
        replicas: that step together, each with pages of its own.
    """
    axes = jax.P() if model.kv_specs[0].parts == 1 else CACHE
    return axes if replicas == 1 else jax.P(DATA, *axes[1:])


def check_split(model: ModelConfig, devices: int, *, replicas: int = 1) -> None:
    """Whether a model can be split over so many devices.

    Args:
        replicas: that step together, each on so many devices.

    Raises:
        ValidationError: it cannot; the text names the numbers that would do.
    """
    problem = _problem(model, devices, replicas)
    if problem is None:
        return
    if replicas == 1:
        fitting = ", ".join(str(n) for n in split_sizes(model))
        raise ValidationError(f"tensor_parallel_size={devices} does not divide {problem}. What would work: {fitting}.")
    tensor, moe = split_sizes(model, replicas=replicas), model.moe if isinstance(model, DecoderConfig) else None
    most = 1 if moe is None else moe.num_experts
    data = [n for n in range(1, most + 1) if not _problem(model, devices, n)]
    advice = [
        f"{given} with {wanted}={', '.join(map(str, numbers))}"
        for given, wanted, numbers in (
            (f"data_parallel_size={replicas}", "tensor_parallel_size", tensor),
            (f"tensor_parallel_size={devices}", "data_parallel_size", data),
        )
        if numbers
    ]
    raise ValidationError(
        f"data_parallel_size={replicas} x tensor_parallel_size={devices} does not divide {problem}. "
        f"What would work: {'; or '.join(advice)}."
    )


def check_storage_split(specs: Any, sizes: Mapping[str, int]) -> None:
    """Whether what quantized matrices are stored as can be split over a mesh of these sizes, as the model can.

    Raises:
        ValidationError: it cannot; the text names the numbers of devices that would do.
    """
    for weight in jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, Reordered) or is_spec(leaf)):
        spec = jax.tree.leaves(weight, is_leaf=is_spec)[0]
        name = _first_name(spec)
        if isinstance(weight, Reordered) and _mesh_axis(spec.axes[-1][0].name, sizes):
            raise ValidationError(
                f"tensor_parallel_size={sizes[TENSOR]}: the columns of {name} are in an order of their own "
                "(desc_act), and cannot be split over devices. What would work: 1."
            )
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        for axis in (axis for joined in spec.axes for axis in joined):
            rule = RULES.get(axis.name)
            devices = 1
            if rule is not None and rule.remainder == "refuse":
                devices = math.prod(axis_sizes(_mesh_axis(axis.name, sizes), sizes).values())
            if axis.units % devices:
                fitting = ", ".join(str(n) for n in range(1, axis.units + 1) if axis.units % n == 0)
                raise ValidationError(
                    f"{devices} devices do not divide the {axis.units} groups of {_first_name(spec)}. "
                    f"What would work: {fitting}."
                )


def _first_name(spec: WeightSpec) -> str:
    """Of a matrix, in the checkpoint."""
    return spec.tensors()[0][0].partition(MARK)[0]


def split_sizes(model: ModelConfig, *, replicas: int = 1) -> list[int]:
    """Every number of devices that a model can be split over, ascending; `replicas` as in `check_split`."""
    return [n for n in range(1, model.num_heads + 1) if not _problem(model, n, replicas)]


def _problem(model: ModelConfig, devices: int, replicas: int = 1) -> str | None:
    kv_heads = model.num_kv_heads
    if model.num_heads % devices:
        return f"the model's {model.num_heads} attention heads"
    if kv_heads % devices and devices % kv_heads:
        return f"the model's {kv_heads} KV heads, nor is it a multiple of them"
    moe = model.moe if isinstance(model, DecoderConfig) else None
    if not (isinstance(model, DecoderConfig) and moe and all(model.layer_moe)) and model.intermediate_size % devices:
        return f"the model's intermediate size of {model.intermediate_size}"
    if moe is not None and moe.shared_size % devices:
        return f"the shared experts' intermediate size of {moe.shared_size}"
    if moe is not None and moe.expert_parallel and moe.num_experts % (replicas * devices):
        return f"the model's {moe.num_experts} experts"
    if moe is not None and not moe.expert_parallel and moe.intermediate_size % devices:
        return f"the experts' intermediate size of {moe.intermediate_size}"
    if devices > 1 and isinstance(model, DecoderConfig) and model.qk_norm and "{head}" in model.names.query_norm:
        return "the norms of the model's heads, of which each is a tensor of its own"
    return None


def layer_sums(model: ModelConfig) -> int:
    """How often the devices that a model is split over add up numbers of theirs in a layer. Of two sums that are
    only added to each other the compiler makes one.
    """
    if isinstance(model, DecoderConfig) and model.parallel and not model.post_norms:
        return 1
    return 3 if isinstance(model, DecoderConfig) and model.qk_norm and model.qk_norm_of == "joint" else 2


def exchanging_layers(model: ModelConfig, replicas: int) -> int:
    """Layers whose experts copies of the model that step together, so many of them, have between them."""
    return sum(model.layer_moe) if isinstance(model, DecoderConfig) and replicas > 1 else 0


def local_model(model: Model, devices: int) -> Model:
    """What one device computes of a model that can be split (`check_split`). The vocabulary stays whole: logits are."""
    if devices == 1:
        return model
    axes = {"num_heads": "heads", "num_kv_heads": "kv_heads", "intermediate_size": "mlp"}
    fields = {field.name for field in dataclasses.fields(model)}
    return dataclasses.replace(
        model,
        **{
            name: held(Axis(axis, getattr(model, name)), {TENSOR: devices}).size
            for name, axis in axes.items()
            if name in fields
        },
    )


def split_axes(sizes: Mapping[str, int]) -> tuple[tuple[str, MeshAxis], ...]:
    """The logical axes that are split on a mesh of these sizes, each with its mesh axis (`layers.context.Context`)."""
    found = ((name, _mesh_axis(name, sizes)) for name in RULES)
    return tuple((name, axis) for name, axis in found if axis is not None)
