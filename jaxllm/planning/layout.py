"""Where each array of an engine lies: what its axes count, over which axes of the mesh they are split, what one device
has of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layers.weight import Axis, WeightSpec, is_spec
from jaxllm.models.segments import segment_sizes
from jaxllm.parallel.rules import RULES, MeshAxis, axis_sizes, cache_axes, held, local_shape, mesh_axes
from jaxllm.runner.runner_config import RunnerConfig

KV_CACHE, KV_SCALES = "KV cache", "KV cache scales"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Where an array lies, or several that differ in nothing but their layers."""

    #: as `LLM.apply_model` shows it, without the number of the segment
    name: str
    #: that has it, of a pipeline; None: there is none
    stage: int | None
    #: how many of them there are
    count: int
    #: that are stacked in it; None: none are
    experts: int | None = None
    #: of each axis, (what it counts, how many of them) of every tensor that is joined along it
    axes: tuple[tuple[tuple[str, int], ...], ...]
    #: of the whole array
    shape: tuple[int, ...]
    #: the axis of the mesh that each axis is split over, or several as one; None: every device has all of it
    mesh_axes: tuple[MeshAxis | None, ...]
    #: of what one device has of it
    device_shape: tuple[int, ...]
    dtype: str
    #: of all of them on one device
    device_bytes: int
    #: whether they lie in the host's memory, of which each step copies them (`cpu_offload_gb`)
    on_host: bool = False

    @property
    def is_split(self) -> bool:
        return any(self.mesh_axes)

    def note(self, sizes: Mapping[str, int]) -> str:
        """Where it is, if not on the device; what of it is there more than once, or nobody's, on a mesh of these sizes;
        "": nothing.
        """
        if self.on_host:
            return "in the host's memory"
        for axis, size, local, joined in zip(self.mesh_axes, self.shape, self.device_shape, self.axes, strict=True):
            devices = math.prod(axis_sizes(axis, sizes).values())
            if local * devices > size:
                repeats = any(
                    name in RULES and RULES[name].remainder == "repeat" and units < devices for name, units in joined
                )
                return "neighbours share heads" if repeats else "filled up with zeros"
        return ""

    def part(self, sizes: Mapping[str, int], numbers: Mapping[str, int]) -> str:
        """What the device at a place of the mesh has of the axes that are split, in words."""
        found = []
        for joined, axis in zip(self.axes, self.mesh_axes, strict=True):
            for name, units in dict.fromkeys(joined) if axis is not None else ():
                first, count, _ = held(Axis(name, units), sizes, numbers)
                found.append(f"{name} {first} to {first + count - 1} of {units}" if count else f"no {name}")
        return ", ".join(found) or "all of it"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ArrayLayout:
        """Of a `dataclasses.asdict`, which may have been JSON since."""
        lists = {name: tuple(fields[name]) for name in ("shape", "device_shape")}
        axes = tuple(tuple((name, units) for name, units in joined) for joined in fields["axes"])
        over = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in fields["mesh_axes"])
        return cls(**{**fields, **lists, "axes": axes, "mesh_axes": over})


def weight_layouts(config: RunnerConfig) -> tuple[ArrayLayout, ...]:
    """Of the weights, in the order of the model's tree; equal arrays of several segments are one entry."""
    found: dict[tuple[Any, ...], ArrayLayout] = {}
    specs, offloaded = config.specs(), config.offloaded
    firsts = list(itertools.accumulate(segment_sizes(specs), initial=0))
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec):
        name = ".".join(key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey))
        # layers of a model that drafts stay on the device
        segments = [
            key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey) and not name.startswith("draft.")
        ]
        on_host = spec.layers is not None and segments[:1] != [] and firsts[segments[0]] in offloaded
        one = dataclasses.replace(_weight_layout(name, spec, config), on_host=on_host)
        key = name, one.shape, on_host
        seen = found.get(key)
        if seen is None:
            found[key] = one
        else:
            more, size = seen.count + 1, seen.device_bytes + one.device_bytes
            found[key] = dataclasses.replace(seen, count=more, device_bytes=size)
    return tuple(found.values())


def adapter_layouts(config: RunnerConfig) -> list[ArrayLayout]:
    """Of the stacks of adapters, a slot for each that the device has at once; []: there are none."""
    if config.lora is None:
        return []
    found: dict[str, ArrayLayout] = {}
    stacks = config.adapter_specs(config.lora.max_loras)
    specs = [
        (f"{field}.{half}", getattr(pair, half))
        for segment in stacks.layers
        for field, pair in segment.items()
        for half in ("a", "b")
    ]
    if stacks.tables is not None:
        specs += [(name, getattr(stacks.tables, name)) for name in ("embedding", "head", "owned")]
    for name, spec in specs:
        if spec is not None:
            one = _weight_layout(f"adapters.{name}", spec, config, config.lora.dtype)
            seen = found.setdefault(f"{name} {one.shape}", dataclasses.replace(one, count=0, device_bytes=0))
            size = seen.device_bytes + one.device_bytes
            found[f"{name} {one.shape}"] = dataclasses.replace(seen, count=seen.count + 1, device_bytes=size)
    return list(found.values())


def _weight_layout(name: str, spec: WeightSpec, config: RunnerConfig, dtype_of_others: str = "") -> ArrayLayout:
    sizes, dtype = config.target.mesh_sizes, jnp.dtype(spec.dtype or dtype_of_others or config.dtype)
    shape = local_shape(spec, sizes)
    layers = () if spec.layers is None else ((("layers", len(spec.layers)),),)
    return ArrayLayout(
        name=name,
        stage=None if config.stage is None else config.stage.index,
        experts=None if spec.experts is None else spec.experts.units,
        count=1,
        axes=(*layers, *(tuple((axis.name, axis.units) for axis in joined) for joined in spec.axes)),
        shape=spec.shape,
        mesh_axes=mesh_axes(spec, sizes),
        device_shape=shape,
        dtype=dtype.name,
        device_bytes=math.prod(shape) * dtype.itemsize,
    )


def cache_layouts(config: RunnerConfig, num_blocks: int) -> list[ArrayLayout]:
    """Of the KV cache: a page has the keys and the values of a block of tokens, of one layer, and perhaps a scale of
    each. Copies of the model that step together have pages of their own.
    """
    own, sizes, replicas = config.layers_per_group * num_blocks, config.target.mesh_sizes, config.target.replicas
    pages = replicas * own
    *others, block, width = whole = config.model.kv_specs[0].page_shape(config.block_size)
    axes = cache_axes(config.model, replicas=replicas)
    names: tuple[str | None, ...] = (*axes, *(None,) * (1 + len(whole) - len(axes)))
    split = (axis if axis is not None and sizes.get(axis, 1) > 1 else None for axis in names)
    pages = ArrayLayout(
        name=KV_CACHE,
        stage=None if config.stage is None else config.stage.index,
        count=1,
        axes=(
            (("pages", pages),),
            # latents are of all heads
            *((("kv_heads", config.model.num_kv_heads),) for _ in others),
            (("tokens", block),),
            (("width", width),),
        ),
        shape=(pages, *whole),
        mesh_axes=tuple(split),
        device_shape=(own, *config.page_shape),
        dtype=config.kv_dtype,
        device_bytes=own * math.prod(config.page_shape) * jnp.dtype(config.kv_dtype).itemsize,
    )
    if config.scales_shape is None:
        return [pages]
    scales = dataclasses.replace(
        pages,
        name=KV_SCALES,
        axes=pages.axes[:-1],
        shape=pages.shape[:-1],
        mesh_axes=pages.mesh_axes[:-1],
        device_shape=pages.device_shape[:-1],
        dtype="float32",
        device_bytes=own * math.prod(config.scales_shape) * 4,
    )
    return [pages, scales]
