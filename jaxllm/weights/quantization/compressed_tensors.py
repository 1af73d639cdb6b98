"""The compressed-tensors format of vLLM's llm-compressor: groups of matrices, each with a scheme of its own.

int-quantized and float-quantized: ``weight`` in eight bits with ``weight_scale``; pack-quantized: ``weight_packed`` i32
[N, ceil(K * bits / 32)], a stream of bits along K of numbers that are 2 ** (bits - 1) too large, ``weight_scale`` [N, K
/ g], and, where they are not symmetric, ``weight_zero_point`` i32 [N * bits / 32, K / g], a stream along N.
``weight_g_idx`` is act-order's, as GPTQ's. nvfp4- and mxfp4-pack-quantized: `float4`, whose inputs stay as they are,
also where a scheme rounds them to four bits. mxfp8-quantized: exponents of two (e8m0) as scales.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout, Layout, ReorderedLayout, RoundedInputsLayout, ScaledLayout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization import float4
from jaxllm.weights.quantization.awq import scale_dtype
from jaxllm.weights.quantization.fp8 import FLOAT8
from jaxllm.weights.quantization.method import (
    Found,
    Method,
    StoredTensors,
    as_stream,
    check_groups,
    codes_of,
    expression,
    in_their_places,
    inner,
    needs,
    one_of,
    packed_pairs,
    stream,
)

FORMATS = (
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


class CompressedTensors(Method):
    """Raises ValidationError for formats and schemes that are not known, and sparsity."""

    name = "compressed-tensors"
    tensors = (
        *float4.TENSORS,
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
        ".input_zero_point",
    )
    markers = (".weight_scale",)
    #: whether regular expressions of targets are tried in the order of their text, as compressed_tensors does
    sorts_patterns: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]):
        self._groups = tuple((config.get("config_groups") or {}).values())
        self._format = str(config.get("format") or "dense")
        self._ignored = frozenset(config.get("ignore") or ())
        self._ignored_patterns = _patterns(self._ignored)
        #: a name is looked for first, then the regular expressions, then the class
        self._targets = {target: group for group in self._groups for target in group.get("targets") or ()}
        self._patterns = _patterns(sorted(self._targets) if self.sorts_patterns else self._targets)
        #: modules that were asked for
        self._schemes: dict[str, Mapping[str, Any] | None] = {}
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise ValidationError(
                "quantization_config of config.json has sparse weights (sparsity_config), which are not supported: "
                "take a checkpoint of the same model without them."
            )
        if (config.get("transform_config") or {}).get("config_groups"):
            raise ValidationError(
                "quantization_config of config.json has transforms of inputs (transform_config), which are not "
                "supported: take a checkpoint of the same model without them."
            )
        one_of(config, "format", FORMATS, "dense")
        for group in self._groups:
            one_of(group, "format", (None, *FORMATS), None)
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            one_of(weights, "type", ("int", "float"), "int")
            one_of(weights, "num_bits", (4, 8) if weights.get("type") == "float" else (2, 3, 4, 8), 8)
            one_of(weights, "strategy", STRATEGIES, "tensor")
            if _is_float4(weights):
                one_of(weights, "group_size", tuple(float4.LAYOUTS), 16)
            if inputs:
                one_of(inputs, "num_bits", (4, 8) if _is_float4(weights) else (8,), 8)
                one_of(inputs, "symmetric", (True, None), True)
                one_of(inputs, "strategy", ("token", "tensor", "group", "tensor_group", None), "token")

    def _scheme(self, module: str) -> Mapping[str, Any] | None:
        """Of a module that has quantized tensors; None: there is none for it under any name that it may have there."""
        if module not in self._schemes:
            self._schemes[module] = next(filter(None, map(self._scheme_of, spellings(module))), None)
        return self._schemes[module]

    def _scheme_of(self, name: str) -> Mapping[str, Any] | None:
        group = None if self._is_ignored(name) else self._group_of(name)
        return group if group is not None and group.get("weights") else None

    def _group_of(self, name: str) -> Mapping[str, Any] | None:
        found = (target for target, pattern in self._patterns.items() if pattern.match(name))
        return self._targets.get(name if name in self._targets else next(found, "Linear"))

    def _is_ignored(self, name: str) -> bool:
        return name in self._ignored or any(pattern.match(name) for pattern in self._ignored_patterns.values())

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        module = name.removesuffix(".weight")
        scheme = None if any(map(self._is_ignored, spellings(module))) else self._scheme(module)
        if scheme is None:
            return None
        weights = scheme["weights"]
        if _is_float4(weights):
            own = float4.LAYOUTS[weights.get("group_size") or 16]
            return _with_inputs(scheme, own, shape[1]) if shape[1] % own.group == 0 else None
        groups = 1
        if weights.get("strategy") == "group":
            groups = shape[1] // int(weights["group_size"])
        elif weights.get("strategy") == "block":
            groups = shape[1] // math.gcd(shape[1], int(weights["block_structure"][1]))
        reordered = weights.get("actorder") == "group"
        return self._layout(scheme, shape[1], groups, "bfloat16", reordered=reordered)

    def _layout(
        self, scheme: Mapping[str, Any], columns: int, groups: int, scales: str, *, reordered: bool = False
    ) -> Layout:
        weights = scheme["weights"]
        bits, group = weights.get("num_bits", 8), columns // groups
        layout: Layout
        if bits < 8 and group % 2 == 0:
            layout = Int4Layout(group=group, scale_dtype=scales)
        else:
            is_float = weights.get("type") == "float"
            layout = ScaledLayout(
                dtype=FLOAT8 if is_float else "int8",
                group=0 if groups == 1 else group,
                scale_dtype=scales,
                has_zeros=not weights.get("symmetric", True),
            )
        return _with_inputs(scheme, ReorderedLayout(layout) if reordered else layout, columns)

    def look(self, tensors: StoredTensors, module: str) -> Found:
        scheme, scale = self._scheme(module), _scale_name(tensors, module)
        if scheme is None:
            raise WeightsError(
                f"the checkpoint has a tensor {scale!r}, and quantization_config of its config.json "
                f"has no scheme for {module}"
            )
        weights = scheme["weights"]
        bits = weights.get("num_bits", 8)
        if _is_float4(weights):
            found = float4.look(tensors, module, weights.get("group_size") or 16)
            layout = _with_inputs(scheme, found.layout, found.shape[1])
            if isinstance(layout, RoundedInputsLayout) and layout.static:
                needs(tensors, f"{module}.input_scale")
            return dataclasses.replace(found, layout=layout)
        if f"{module}.weight_packed" in tensors.names():
            rows, words = needs(tensors, f"{module}.weight_packed", (None, None))
            needs(tensors, f"{module}.weight_shape")
            columns = int(np.ravel(tensors.raw(f"{module}.weight_shape"))[1])
            if words != -(-columns * bits // 32):
                raise WeightsError(
                    f"tensor {module + '.weight_packed'!r} has {words} words a row, and {columns} numbers of {bits} "
                    f"bits are {-(-columns * bits // 32)}"
                )
        else:
            rows, columns = needs(tensors, f"{module}.weight", (None, None))
            stored, known = tensors.dtype(f"{module}.weight"), "F8_E4M3" if weights.get("type") == "float" else "I8"
            if stored != known:
                raise WeightsError(f"tensor {module + '.weight'!r} has type {stored}, and by its scheme it is {known}")
        shape = tensors.shape(scale)
        groups = 1
        if weights.get("strategy") == "block":
            across, along = map(int, weights["block_structure"])
            blocks = -(-rows // across), -(-columns // along)
            # ModelOpt's have an axis more for each
            needs(tensors, scale, (blocks[0], 1, blocks[1], 1) if len(shape) == 4 else blocks)
            groups = columns // math.gcd(columns, along)
        elif shape not in ((), (1,), (rows,)):
            rows_of, groups = needs(tensors, scale, (rows, None))
            if not groups or columns % groups:
                raise WeightsError(
                    f"tensor {scale!r} has {groups} groups, which do not divide the matrix's {columns} columns"
                )
        reordered = f"{module}.weight_g_idx" in tensors.names()
        if reordered:
            check_groups(tensors, f"{module}.weight_g_idx", columns, groups)
        # bfloat16 holds every power of two that e8m0 does
        scales = "bfloat16" if tensors.dtype(scale) == "U8" else scale_dtype(tensors, scale)
        layout = self._layout(scheme, columns, groups, scales, reordered=reordered)
        own = inner(layout)
        if not weights.get("symmetric", True):
            packed = isinstance(own, Int4Layout) or f"{module}.weight_packed" in tensors.names()
            zeros = (-(-rows * bits // 32), groups) if packed else (rows, groups)
            needs(tensors, f"{module}.weight_zero_point", zeros)
        if isinstance(layout, RoundedInputsLayout) and layout.static:
            needs(tensors, f"{module}.input_scale")
        return Found(layout, (rows, columns))

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module, layout, (count, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        scheme = self._scheme(module)
        assert scheme is not None
        weights = scheme["weights"]
        if kind == "inputs":
            return np.ravel(tensors.read(f"{module}.input_scale"))[:1]
        if _is_float4(weights):
            return float4.array(tensors, module, layout, count, kind)
        bits, groups = weights.get("num_bits", 8), layout.shapes(count, columns)["scales"][1]
        packed = f"{module}.weight_packed" in tensors.names()
        order = slice(None)
        if f"{module}.weight_g_idx" in tensors.names():
            order = np.argsort(tensors.raw(f"{module}.weight_g_idx"), kind="stable").astype(np.int32)
        if kind == "order":
            return np.asarray(order)
        if kind == "scales":
            scales = tensors.raw(_scale_name(tensors, module))
            if scales.dtype == np.uint8:
                scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
            if weights.get("strategy") == "block":
                scales = scales.reshape(len(scales), -1)
                across, along = map(int, weights["block_structure"])
                spread = np.repeat(scales, along // math.gcd(columns, along), axis=1)[:, :groups]
                return np.repeat(spread, across, axis=0)[:count]
            return np.broadcast_to(scales.reshape(-1, groups), (count, groups))
        half = 1 << (bits - 1)
        if kind == "zeros":
            if weights.get("symmetric", True):
                return np.full((count, groups), half, np.uint8)
            zeros = tensors.raw(f"{module}.weight_zero_point")
            if packed:
                zeros = stream(zeros.T, bits, count).T
                return zeros if isinstance(layout, Int4Layout) else zeros.astype(np.int16) - half
            return zeros
        if packed:
            codes = stream(tensors.raw(f"{module}.weight_packed"), bits, columns)[:, order]
        elif isinstance(layout, Int4Layout):
            codes = (tensors.raw(f"{module}.weight").astype(np.int16) + half).astype(np.uint8)[:, order]
        else:
            return tensors.raw(f"{module}.weight")[:, order]
        if isinstance(layout, Int4Layout):
            return packed_pairs(codes, layout.group)
        return (codes.astype(np.int16) - half).astype(np.int8)

    writes = True

    def written(self, name: str, found: Found, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        module, layout, (rows, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        scheme = self._scheme(module)
        assert scheme is not None
        weights, order = scheme["weights"], arrays.get("order")
        bits, groups = weights.get("num_bits", 8), arrays["scales"].shape[1]
        strategy, scales = weights.get("strategy", "tensor"), arrays["scales"]
        form = scheme.get("format") or self._format
        if strategy == "block" or _is_float4(weights) or form == "mxfp8-quantized":
            raise ValidationError(
                f"{module}: scales of blocks, of four-bit floats and of exponents lie in memory otherwise than in a "
                "file, and are not written. Copy the checkpoint."
            )
        tensors = {"weight_scale": scales[:1, 0] if strategy == "tensor" else scales}
        if "inputs" in arrays:
            tensors["input_scale"] = arrays["inputs"]
        half = 1 << (bits - 1)
        if isinstance(layout, Int4Layout):
            codes, zeros = codes_of(arrays["packed"], layout.group), arrays["zeros"].astype(np.int16)
        else:
            codes = arrays["values"]
            zeros = arrays["zeros"] + half if "zeros" in arrays else np.full(scales.shape, half)
        if zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 1 << bits:
            raise ValidationError(f"{module}: zero points of {bits} bits reach to {(1 << bits) - 1}.")
        assert not weights.get("symmetric", True) or (zeros == half).all()
        if form == "pack-quantized":
            if not isinstance(layout, Int4Layout):
                codes = (codes.astype(np.int16) + half).astype(np.uint8)
            tensors["weight_packed"] = as_stream(in_their_places(codes, order), bits)
            tensors["weight_shape"] = np.array([rows, columns], np.int64)
            if not weights.get("symmetric", True):
                tensors["weight_zero_point"] = np.ascontiguousarray(as_stream(zeros.T.astype(np.int32), bits).T)
        else:
            numbers = (codes.astype(np.int16) - half).astype(np.int8) if isinstance(layout, Int4Layout) else codes
            tensors["weight"] = in_their_places(numbers, order)
            if not weights.get("symmetric", True):
                tensors["weight_zero_point"] = (zeros - half).astype(np.int8)
        if order is not None:
            of_column = np.arange(columns, dtype=np.int32) // (columns // groups)
            tensors["weight_g_idx"] = in_their_places(of_column[None], order)[0]
        return {f"{module}.{end}": np.ascontiguousarray(tensor) for end, tensor in tensors.items()}


def _patterns(names: Iterable[str]) -> dict[str, re.Pattern[str]]:
    """Those that are regular expressions."""
    return {name: expression(name.removeprefix("re:")) for name in names if name.startswith("re:")}


def _scale_name(tensors: StoredTensors, module: str) -> str:
    """Of the tensor that has a module's scales, which are multiplied by under either name."""
    inverse = f"{module}.weight_scale_inv"
    return inverse if inverse in tensors.names() else f"{module}.weight_scale"


def _is_float4(weights: Mapping[str, Any]) -> bool:
    return weights.get("type") == "float" and weights.get("num_bits", 8) == 4


def _with_inputs(scheme: Mapping[str, Any], layout: Layout, columns: int) -> Layout:
    """With what the scheme rounds inputs to, where these are eight bits: in groups that divide them, as blocks do."""
    inputs = scheme.get("input_activations")
    if not inputs or inputs.get("num_bits", 8) != 8:
        return layout
    dtype = FLOAT8 if inputs.get("type") == "float" else "int8"
    size = int(inputs.get("group_size") or 0) if inputs.get("strategy") == "group" else 0
    group = math.gcd(columns, size) if size else 0
    return RoundedInputsLayout(layout=layout, dtype=dtype, group=group, static=inputs.get("dynamic") is False)
