"""Adapters (LoRA, arXiv:2106.09685) of a model of `jaxllm.flax`, as parameters of `flax.nnx`, and PEFT's files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxllm.api.errors import ValidationError
from jaxllm.layers.adapted import Adapted
from jaxllm.layers.weight import Part, WeightSpec
from jaxllm.models.adapters import Stacks, adapted_matrices, with_adapters, with_slots
from jaxllm.models.params import Params
from jaxllm.weights.peft import CONFIG, WEIGHTS
from pallas_kernels.backend import Backend


class Adapter(nnx.Module):
    """Of one module in each layer of a segment. The product is ``b @ a``; b begins as zeros."""

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a = nnx.LoRAParam(a)  # float32 [L, r, in]
        self.b = nnx.LoRAParam(b)  # float32 [L, out, r]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix of a segment of layers that can have adapters: several modules, where it is joined."""

    field: str
    layers: tuple[int, ...]
    parts: tuple[Part, ...]
    #: ends of names that several modules of a layer have
    common: frozenset[str] = frozenset()

    def module(self, part: Part) -> str:
        """The end of its name: "q_proj"; or, where another module's ends so, too, all of it in the layer."""
        name, end = _name_in_layer(part), _name_in_layer(part).rpartition(".")[2]
        return name if end in self.common else end


class TrainableAdapters(nnx.Module):
    """Adapters of a model's layers, by segment and by module.

    Args:
        specs: of the model, in the segments that its weights have.
        rank: of each, at least 1.
        alpha: their factor is alpha / rank.
        targets: the ends of the names of the modules that have one; None: all that can.
        base: what PEFT's file calls the model.
        seed: of a, drawn as PEFT draws it.

    Raises:
        ValidationError: a rank below 1, no such module.
    """

    def __init__(self, specs: Any, *, rank: int, alpha: float, targets: tuple[str, ...] | None, base: str, seed: int):
        if rank < 1:
            raise ValidationError(f"lora_rank must be at least 1, got {rank}.")
        self.rank, self.alpha, self.base = rank, alpha, base
        self._matrices = tuple(_matrices(segment) for segment in specs.layers)
        known = {each.module(part) for segment in self._matrices for each in segment for part in each.parts}
        asked = sorted(known) if targets is None else sorted(set(targets))
        found = {target: [name for name in known if f".{name}".endswith(f".{target}")] for target in asked}
        self.targets = tuple(sorted({name for names in found.values() for name in names}))
        if missing := {target for target, names in found.items() if not names}:
            raise ValidationError(
                f"target_modules has {sorted(missing)}, which the model has not; those that it has: {sorted(known)}."
            )
        key = jax.random.key(seed)
        layers = []
        for segment in self._matrices:
            own: dict[str, Adapter] = {}
            for each, part in _parts(segment):
                name, (features, columns) = each.module(part), part.tensor_shape
                if name in self.targets and name not in own:
                    key, drawn = jax.random.split(key)
                    bound = 1 / math.sqrt(columns)
                    a = jax.random.uniform(drawn, (len(each.layers), rank, columns), minval=-bound, maxval=bound)
                    own[name] = Adapter(a, jnp.zeros((len(each.layers), features, rank)))
            layers.append(nnx.Dict(own))
        self.layers = nnx.List(layers)

    def beside(self, params: Params, num_tokens: int) -> Params:
        """The model's weights with the adapters beside them, for so many tokens, all of which have them."""
        stacks = []
        for segment, own in zip(self._matrices, self.layers, strict=True):
            found = {}
            for each in segment:
                if any(each.module(part) in own for part in each.parts):
                    a, b = self._joined(each, own)
                    parts = tuple(part.shape[0] for part in each.parts)
                    found[each.field] = Adapted(a=a, b=b, parts=parts)
            stacks.append(found)
        return with_slots(with_adapters(params, Stacks(tuple(stacks))), jnp.zeros(num_tokens, jnp.int32), Backend())

    def _joined(self, matrix: _Matrix, own: Any) -> tuple[jax.Array, jax.Array]:
        """a [L, 1, P * r, in] and b [L, 1, r, out] of all parts, zeros where one has none."""
        a, b = [], []
        for part in matrix.parts:
            name, (rows, columns) = matrix.module(part), part.shape
            if name in own:
                span, ours = part.in_tensor(0, rows)
                a.append(own[name].a[...])
                b.append(own[name].b[...][:, span][:, ours])
            else:
                a.append(jnp.zeros((len(matrix.layers), self.rank, columns)))
                b.append(jnp.zeros((len(matrix.layers), rows, self.rank)))
        factor = self.alpha / self.rank
        return jnp.concatenate(a, axis=1)[:, None], jnp.concatenate(b, axis=1).swapaxes(1, 2)[:, None] * factor

    def save(self, folder: Path) -> None:
        """Write PEFT's two files."""
        tensors: dict[str, np.ndarray] = {}
        for segment, own in zip(self._matrices, self.layers, strict=True):
            for each, part in _parts(segment):
                if each.module(part) not in own:
                    continue
                adapter = own[each.module(part)]
                matrices = {"A": np.asarray(adapter.a[...]), "B": np.asarray(adapter.b[...])}
                for i, layer in enumerate(each.layers):
                    name = part.name.format(layer=layer).removesuffix(".weight")
                    for half, stack in matrices.items():
                        tensors[f"base_model.model.{name}.lora_{half}.weight"] = np.ascontiguousarray(stack[i])
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name_in_layer(part: Part) -> str:
    return part.name.removesuffix(".weight").rpartition("{layer}.")[2]


def _matrices(segment: Any) -> tuple[_Matrix, ...]:
    found: list[tuple[str, WeightSpec]] = list(adapted_matrices(segment))
    names = {_name_in_layer(part) for _, spec in found for part in spec.parts}
    ends = [name.rpartition(".")[2] for name in names]
    common = frozenset(end for end in ends if ends.count(end) > 1)
    return tuple(_Matrix(field, tuple(spec.layers or ()), spec.parts, common) for field, spec in found)


def _parts(segment: tuple[_Matrix, ...]) -> Iterator[tuple[_Matrix, Part]]:
    return ((each, part) for each in segment for part in each.parts)
