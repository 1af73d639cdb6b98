"""quantization_config of compressed-tensors checkpoints that are written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout, Layout, RoundedInputsLayout, ScaledLayout
from jaxllm.weights.quantization.fp8 import FLOAT8
from jaxllm.weights.quantization.method import inner


def configuration(layouts: Mapping[str, Layout], left_out: Iterable[str], *, symmetric: bool = False) -> dict[str, Any]:
    """quantization_config of a checkpoint in this format.

    Args:
        layouts: of the quantized modules: `Int4Layout` is packed, int8 packed or, where inputs are rounded, as it is,
            and so is float8.
        symmetric: whether the zero points of four bits are all 8, and not written.
        left_out: modules that are not quantized.

    Raises:
        ValidationError: a layout has no such form, or two need different formats.
    """
    schemes: dict[str, dict[str, Any]] = {}
    modules: dict[str, list[str]] = {}
    for module, layout in layouts.items():
        scheme = _written_scheme(layout, symmetric)
        key = json.dumps(scheme)
        schemes[key] = scheme
        modules.setdefault(key, []).append(module)
    formats = {scheme["format"] for scheme in schemes.values()}
    if len(formats) != 1:
        raise ValidationError(f"Matrices of one checkpoint cannot be {' and '.join(sorted(formats))}.")
    groups = {
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else modules[key], **scheme}
        for i, (key, scheme) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop(),
        "quantization_status": "compressed",
        "ignore": list(left_out),
        "config_groups": groups,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _written_scheme(layout: Layout, symmetric: bool) -> dict[str, Any]:
    """What a config group says of a layout, but for its targets."""
    own, inputs = inner(layout), None
    if isinstance(layout, RoundedInputsLayout):
        kind = "float" if layout.dtype == FLOAT8 else "int"
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        if layout.static or layout.group:
            raise ValidationError("Inputs with scales of the checkpoint's or of groups are not written.")
    weights: dict[str, Any] = {"dynamic": False, "observer": "minmax", "actorder": None, "block_structure": None}
    if isinstance(own, Int4Layout):
        weights |= {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": own.group}
        return {"format": "pack-quantized", "weights": weights, "input_activations": inputs}
    if not isinstance(own, ScaledLayout) or own.has_zeros or (own.group and own.dtype == FLOAT8):
        raise ValidationError(f"{type(own).__name__} has no form in compressed-tensors.")
    groups = {"strategy": "group", "group_size": own.group} if own.group else {"strategy": "channel"}
    if own.dtype == FLOAT8:
        form = "float-quantized"
    else:
        form = "pack-quantized" if inputs is None else "int-quantized"
    weights |= {"num_bits": 8, "type": "float" if own.dtype == FLOAT8 else "int", "symmetric": True, **groups}
    return {"format": form, "weights": weights, "input_activations": inputs}
