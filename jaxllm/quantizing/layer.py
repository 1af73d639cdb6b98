"""One layer, quantized: the tensors that are written, the weights that run, and how far its products are off."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight import WeightSpec, is_spec
from jaxllm.layers.weight_storage import (
    CodebookLayout,
    Int4Layout,
    Layout,
    ReorderedLayout,
    RoundedInputsLayout,
    ScaledLayout,
)
from jaxllm.models.params import Layers
from jaxllm.quantizing.awq import clipped
from jaxllm.quantizing.compiled import compiled
from jaxllm.quantizing.gptq import gptq
from jaxllm.quantizing.grid import Grid, Rounded
from jaxllm.quantizing.inputs import InputMoments, row_errors
from jaxllm.quantizing.model_layers import ModelLayers, is_matrix, leaf_name
from jaxllm.quantizing.report import MatrixError
from jaxllm.quantizing.scaling import Scales, scale_layer
from jaxllm.quantizing.scheme import CALIBRATED, GROUPED, MatrixForms, nearest_arrays, rounded_arrays
from jaxllm.weights.formats import hugging_face
from jaxllm.weights.quantization.method import Found
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quantized import CodebookWeight, Joined, Quantized, Reordered, RoundedInputs, ScaledWeight, dense

Arrays = Mapping[str, Any]
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"\.(?:layers|h)\.\d+\.")
F32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What became of a layer."""

    #: as `ModelLayers.run` takes them
    weights: Layers
    #: by their names in the checkpoint
    tensors: Mapping[str, np.ndarray]
    errors: tuple[MatrixError, ...]


def quantize_layer(
    model: ModelLayers, forms: MatrixForms, number: int, weights: Layers, inputs: Mapping[str, InputMoments]
) -> QuantizedLayer:
    """Quantize a layer.

    Args:
        number: which one it is.
        weights: `ModelLayers.read`.
        inputs: `ModelLayers.observe`; matrices without any are rounded to the nearest, whatever the method.
    """
    leaves = jax.tree.leaves_with_path(model.specs.layers[number], is_leaf=is_spec)
    specs = {leaf_name(path): spec for path, spec in leaves}
    matrices = {
        leaf_name(path): _Matrix(forms, spec, inputs.get(leaf_name(path))) for path, spec in leaves if is_matrix(path)
    }
    scaled, scales = weights, Scales({}, {})
    if forms.scheme.method == "awq" and inputs:
        # what is left out keeps its columns, and its inputs with them
        grids = {
            name: forms.grid(matrix.layout)
            for name, matrix in matrices.items()
            if name in inputs and matrix.layout is not None and matrix.whole
        }
        scaled, scales = scale_layer(model.config, grids, weights, inputs, model.dtype)
    tensors: dict[str, np.ndarray] = {}
    errors: list[MatrixError] = []

    def one(path: tuple[Any, ...], array: jax.Array) -> Any:
        name = leaf_name(path)
        if name not in matrices:
            for tensor in hugging_face.tensors(specs[name], array):
                tensors[tensor.name] = tensor.value().astype(specs[name].dtype or model.dtype)
            return array
        matrix = matrices[name]
        value, written, found = matrix.rounded(name, array, scales, model.dtype)
        tensors.update(written)
        errors.extend(
            MatrixError(layer=number, matrix=module, error=own, nearest=nearest)
            for module, (own, nearest) in found.items()
        )
        return value

    quantized = jax.tree.map_with_path(one, scaled)
    return QuantizedLayer(weights=quantized, tensors=tensors, errors=tuple(errors))


class _Matrix:
    """A matrix of the layer, or those of all experts: parts that are multiplied by the same inputs.

    Raises:
        ValidationError: some experts are left out, and others not.
    """

    def __init__(self, forms: MatrixForms, spec: WeightSpec, inputs: InputMoments | None):
        self._forms, self._spec, self._inputs = forms, spec, inputs
        #: by the name of each tensor: None, it is not quantized
        layouts = {name: forms.layouts.get(name.removesuffix(".weight")) for name, _, _ in spec.places()}
        assert spec.layers is not None
        #: of each part
        self._layouts: list[Layout | None] = []
        for part in spec.parts:
            names = [part.name.format(layer=spec.layers[0], expert=i) for i in range(_num_experts(spec))]
            forms_of = {layouts[name] for name in names}
            if len(forms_of) > 1:
                raise ValidationError(f"ignore leaves out some experts of {names[0]} and others not: name all or none.")
            self._layouts.append(layouts[names[0]])
        #: of those that are quantized; None: there are none
        self.layout = next((layout for layout in self._layouts if layout is not None), None)

    @property
    def whole(self) -> bool:
        """Whether all parts are quantized."""
        return None not in self._layouts

    def rounded(
        self, name: str, array: jax.Array, scales: Scales, dtype: jnp.dtype
    ) -> tuple[Any, dict[str, np.ndarray], dict[str, tuple[float, float]]]:
        """The weight that runs, the tensors that are written, and by module the error, and that of rounding to the
        nearest.

        Args:
            array: [1, N, K], or [1, experts, N, K].
            dtype: of what is left out.
        """
        *stack, rows, columns = array.shape
        plain = [np.asarray(array).reshape(-1, rows, columns)[i] for i in range(math.prod(stack))]
        scaled = [scales.scaled(name, matrix) for matrix in plain]
        layout = self.layout
        kept = None
        if not self.whole:
            kept = np.stack(scaled).reshape(array.shape).astype(dtype)
        if layout is None:
            assert kept is not None
            return jnp.asarray(kept, F32), dict(self._tensors(kept)), {}
        found = [self._round(layout, matrix) for matrix in scaled]
        made = [
            scales.undone(name, np.asarray(_matrix(weight_of(layout, jax.tree.map(jnp.asarray, each)))))
            for each in found
        ]
        errors = self._errors(layout, plain, made)
        arrays = {
            kind: np.stack([each[kind] for each in found]).reshape(*stack, *found[0][kind].shape) for kind in found[0]
        }
        return self._value(layout, arrays, kept), self._written(arrays, kept, columns), errors

    def _round(self, layout: Layout, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the layout."""
        forms, inputs = self._forms, self._inputs
        method, reorders = forms.scheme.method, isinstance(layout, ReorderedLayout)
        if method not in GROUPED or (method == "int4" and not forms.scheme.is_symmetric):
            return nearest_arrays(layout, matrix)
        grid = forms.grid(layout)
        if method not in CALIBRATED or inputs is None:
            order = np.arange(matrix.shape[1], dtype=np.int32) if reorders else None
            return rounded_arrays(layout, _nearest(grid, jnp.asarray(matrix)), order)
        if method == "awq":
            return rounded_arrays(layout, clipped(grid, jnp.asarray(matrix), inputs.gram))
        return rounded_arrays(layout, *gptq(grid, jnp.asarray(matrix), inputs.gram, act_order=reorders))

    def _value(self, layout: Layout, arrays: Arrays, kept: np.ndarray | None) -> Any:
        if self.whole:
            return weight_of(layout, arrays)
        bounds = itertools.pairwise(itertools.accumulate((part.axes[0].size for part in self._spec.parts), initial=0))
        parts = []
        for own, (first, last) in zip(self._layouts, bounds, strict=True):
            if own is None:
                assert kept is not None
                parts.append(jnp.asarray(kept[..., first:last, :], F32))
            else:
                parts.append(
                    weight_of(layout, {k: a if k == "order" else a[..., first:last, :] for k, a in arrays.items()})
                )
        return Joined(tuple(parts))

    def _written(self, arrays: Arrays, kept: np.ndarray | None, columns: int) -> dict[str, np.ndarray]:
        forms = self._forms
        of_kind = {kind: dict(self._tensors(array)) for kind, array in arrays.items() if kind != "order"}
        tensors: dict[str, np.ndarray] = {} if kept is None else dict(self._tensors(kept))
        for name, rows in of_kind["scales"].items():
            layout = forms.layouts.get(name.removesuffix(".weight"))
            if layout is None:
                continue
            tensors.pop(name, None)
            own = {kind: array[name] for kind, array in of_kind.items()}
            if "order" in arrays:
                own["order"] = arrays["order"].reshape(-1, columns)[0]
            tensors.update(forms.writer.written(name, Found(layout, (len(rows), columns)), own))
        return tensors

    def _errors(
        self, layout: Layout, matrices: list[np.ndarray], made: list[np.ndarray]
    ) -> dict[str, tuple[float, float]]:
        forms, rows = self._forms, []
        gram = None if self._inputs is None else self._inputs.gram
        grid = forms.grid(layout) if forms.scheme.method in CALIBRATED else None
        for matrix, own in zip(matrices, made, strict=True):
            rows.append(np.asarray(_off(grid, jnp.asarray(matrix), jnp.asarray(own), gram), np.float64))
        together = np.stack(rows).reshape(*self._lead, -1, 3)
        sums: dict[str, np.ndarray] = {}
        for name, own in self._tensors(together):
            layout_of = forms.layouts.get(name.removesuffix(".weight"))
            if layout_of is not None:
                module = _without_number(name.removesuffix(".weight"))
                sums[module] = sums.get(module, np.zeros(3)) + own.sum(axis=0)
        return {
            module: (math.sqrt(own / whole), math.sqrt(plain / whole)) if whole else (0.0, 0.0)
            for module, (own, plain, whole) in sums.items()
        }

    @property
    def _lead(self) -> tuple[int, ...]:
        return (1,) if self._spec.experts is None else (1, _num_experts(self._spec))

    def _tensors(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The rows of each tensor, of an array [1, N, ...] or [1, experts, N, ...] with as many rows as the matrix."""
        for name, places in itertools.groupby(self._spec.places(), key=operator.itemgetter(0)):
            parts = [(part, array[index]) for _, part, index in places]
            first, rows = parts[0]
            if len(parts) > 1 or first.rows is not None:
                whole = np.empty((first.tensor_shape[0], rows.shape[1]), array.dtype)
                for part, own in parts:
                    span, ours = part.in_tensor(0, part.shape[0])
                    whole[span][ours] = own
                rows = whole
            yield name, rows


@compiled
def _matrix(weight: Quantized) -> jax.Array:
    return dense(weight, F32)


@functools.partial(compiled, static_argnums=0)
def _nearest(grid: Grid, matrix: jax.Array) -> Rounded:
    return grid.round(matrix)


@functools.partial(compiled, static_argnums=0)
def _off(grid: Grid | None, matrix: jax.Array, made: jax.Array, gram: jax.Array | None) -> jax.Array:
    """Of each row, how far its products are off, how far those of the nearest numbers are, and the products themselves,
    squared: float32 [N, 3].

    Args:
        grid: None: `made` is the nearest.
        gram: None: of the rows themselves.
    """
    nearest = made if grid is None else grid.round(matrix).matrix()
    each = (made - matrix, nearest - matrix, matrix)
    errors = [jnp.sum(d * d, axis=1) if gram is None else row_errors(d, gram) for d in each]
    return jnp.stack(errors, axis=1)


def weight_of(layout: Layout, arrays: Arrays) -> Quantized:
    """The weight that a layout's arrays hold, as a layer's product takes it.

    Args:
        arrays: by the names of `Layout.shapes`, as they are there, and with any dimensions in front.
    """
    if isinstance(layout, ReorderedLayout):
        return Reordered(weight_of(layout.layout, arrays), jnp.asarray(arrays["order"]))
    if isinstance(layout, RoundedInputsLayout):
        return RoundedInputs(weight=weight_of(layout.layout, arrays), dtype=layout.dtype, group=layout.group)
    if isinstance(layout, Int4Layout):
        scales, zeros = (jnp.asarray(arrays[kind]).swapaxes(-1, -2) for kind in ("scales", "zeros"))
        return Int4Weight(packed=jnp.asarray(arrays["packed"]), scales=scales, zeros=zeros)
    if isinstance(layout, CodebookLayout):
        return CodebookWeight(table=layout.table, **{kind: jnp.asarray(array) for kind, array in arrays.items()})
    assert isinstance(layout, ScaledLayout)
    zeros = jnp.asarray(arrays["zeros"]) if layout.has_zeros else None
    return ScaledWeight(values=jnp.asarray(arrays["values"]), scales=jnp.asarray(arrays["scales"]), zeros=zeros)


def _num_experts(spec: WeightSpec) -> int:
    return 1 if spec.experts is None else spec.experts.units


def _without_number(module: str) -> str:
    """A module's name in its layer; of an expert's, that of all."""
    return _EXPERT.sub(".experts.*.", _LAYER.split(module, maxsplit=1)[-1])
