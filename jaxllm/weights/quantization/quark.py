"""AMD's Quark: its specs of eight-bit floats and integers, and of MXFP4, as schemes of compressed-tensors, whose
tensors these checkpoints have (``weight``, ``weight_scale``, ``input_scale``).

Integers in groups lie transposed: eight bits as ``weight`` i8 [K, N]; four as i32 [K, N / 8], and ``weight_zero_point``
[K / g, N / 8], of which the lowest four bits of a word are its column 0, then 2, 4, 6, 1, 3, 5, 7, as AWQ's, or, where
``pack_method`` is "order", 1 to 7. ``weight_scale`` is [K / g, N], in files of before Quark 1.0 [N, K / g]. "int4" has
a sign in its highest bit, "uint4" none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.awq import columns_of, scale_dtype
from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.method import Found, StoredTensors, inner, needs, one_of, packed_pairs, stream

#: dtype of a spec -> type and bits
_DTYPES = {"fp8_e4m3": ("float", 8), "int8": ("int", 8), "fp4": ("float", 4), "uint4": ("int", 4), "int4": ("int", 4)}
_UNQUANTIZED = ("float32", "bfloat16", "float16")
_STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_block": "block"}


class Quark(CompressedTensors):
    """Raises ValidationError for a spec that is not known."""

    name = "quark"
    writes = False
    sorts_patterns = False

    def __init__(self, config: Mapping[str, Any]):
        if (config.get("export") or {}).get("weight_format", "real_quantized") != "real_quantized":
            raise ValidationError(
                "quantization_config of config.json says weight_format='fake_quantized': such weights are floats. Take "
                "quantization_config out of config.json, or export the model with weight_format='real_quantized'."
            )
        layers = (config.get("layer_quant_config") or {}).items()
        groups = {name: {"targets": [_pattern(name)], **_scheme(layer)} for name, layer in layers}
        groups["all"] = {"targets": ["Linear"], **_scheme(config.get("global_quant_config") or {})}
        super().__init__({"config_groups": groups, "ignore": list(map(_pattern, config.get("exclude") or ()))})
        methods = ("reorder", "order")
        self._reorders = one_of(config.get("export") or {}, "pack_method", methods, methods[0]) == methods[0]

    def look(self, tensors: StoredTensors, module: str) -> Found:
        scheme = self._scheme(module)
        if scheme is None or not _is_transposed(scheme["weights"]):
            return super().look(tensors, module)
        weights, scale = scheme["weights"], f"{module}.weight_scale"
        bits, size = weights["num_bits"], int(weights["group_size"])
        columns, words = needs(tensors, f"{module}.weight", (None, None))
        stored, known = tensors.dtype(f"{module}.weight"), "I32" if bits == 4 else "I8"
        if stored != known:
            raise WeightsError(f"tensor {module + '.weight'!r} has type {stored}, and by its scheme it is {known}")
        groups, rest = divmod(columns, size)
        if rest or size % 2:
            raise WeightsError(f"{module} has {columns} columns, which are no groups of {size} of an even number")
        shape = needs(tensors, scale, (None, None))
        rows = shape[1] if shape[0] == groups else shape[0]
        if shape not in ((groups, rows), (rows, groups)) or words != (-(-rows // 8) if bits == 4 else rows):
            raise WeightsError(
                f"tensor {scale!r} has shape {shape}, and {module} has {groups} groups of {size} columns"
            )
        if self._has_zeros(tensors, module, weights):
            needs(tensors, f"{module}.weight_zero_point", (groups, words))
        layout = self._layout(scheme, columns, groups, scale_dtype(tensors, scale))
        return Found(layout, (rows, columns))

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module, layout, (count, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        weights = (self._scheme(module) or {})["weights"]
        if kind == "inputs" or not _is_transposed(weights):
            return super().array(tensors, name, found, kind, rows, within)
        if kind == "scales":
            scales = tensors.raw(f"{module}.weight_scale")
            return scales.T if scales.shape == layout.shapes(count, columns)["scales"][::-1] else scales
        is_int4 = isinstance(layout, Int4Layout)
        if kind != "zeros":
            codes = self._numbers(tensors, f"{module}.weight", weights, count)
            return packed_pairs(codes, layout.group) if is_int4 else codes
        if not self._has_zeros(tensors, module, weights):
            return np.full(layout.shapes(count, columns)["zeros"], 8, np.uint8)
        return self._numbers(tensors, f"{module}.weight_zero_point", weights, count)

    @staticmethod
    def _has_zeros(tensors: StoredTensors, module: str, weights: Mapping[str, Any]) -> bool:
        """Whether there are to be zero points in the file: symmetric numbers of four bits may have them, too."""
        is_there = f"{module}.weight_zero_point" in tensors.names()
        return not weights.get("symmetric", True) or (weights["num_bits"] == 4 and is_there)

    def _numbers(self, tensors: StoredTensors, name: str, weights: Mapping[str, Any], rows: int) -> np.ndarray:
        """Of a transposed tensor, [N, ...]: int8, or of four bits uint8, those with a sign eight too large."""
        stored = tensors.raw(name)
        if weights["num_bits"] == 8:
            return stored.T
        numbers = columns_of(stored) if self._reorders else stream(stored, 4, stored.shape[1] * 8)
        return numbers[:, :rows].T ^ (8 if weights["has_sign"] else 0)


def _scheme(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a config says of a kind of layers."""
    weights, inputs = _spec(spec.get("weight")), _spec(spec.get("input_tensors"))
    if weights is None:
        return {}
    if inputs is not None and inputs["num_bits"] == 8 and inputs["strategy"] == "channel":
        # it calls so what has a scale a token
        inputs["strategy"] = "token"
    return {"weights": weights, "input_activations": inputs}


def _spec(spec: Any) -> dict[str, Any] | None:
    one = spec[0] if isinstance(spec, list) and len(spec) == 1 else spec
    if isinstance(one, list):
        raise ValidationError(
            "quantization_config of config.json quantizes in two steps, which is not supported: take a Quark "
            "checkpoint in fp8, int8 or MXFP4."
        )
    if not one or one.get("dtype") in _UNQUANTIZED:
        return None
    kind, bits = _DTYPES[one_of(one, "dtype", tuple(_DTYPES), None)]
    strategy = _STRATEGIES[one_of(one, "qscheme", tuple(_STRATEGIES), "per_tensor")]
    found = {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": bool(one.get("is_dynamic"))}
    if one.get("symmetric") is False:
        found["symmetric"] = False
    if kind == "int" and bits == 4:
        one_of(one, "qscheme", ("per_group",), None)
        found["has_sign"] = one["dtype"] == "int4"
    if strategy == "group" and not one.get("group_size"):
        raise ValidationError(
            "quantization_config of config.json says qscheme='per_group' without a group_size: add the one that the "
            "model was quantized with."
        )
    if one.get("group_size"):
        found["group_size"] = one["group_size"]
    if one.get("block_size"):
        found["block_structure"] = one["block_size"]
    return found


def _is_transposed(weights: Mapping[str, Any]) -> bool:
    """Whether a matrix lies as [K, N]."""
    return weights["type"] == "int" and weights["strategy"] == "group"


def _pattern(name: str) -> str:
    """A wildcard, or what is a regular expression or a name already, as targets have it."""
    return f"re:{fnmatch.translate(name)}" if "*" in name and not name.startswith("re:") else name
