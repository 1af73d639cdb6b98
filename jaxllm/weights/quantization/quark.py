"""AMD's Quark: its specs of eight-bit floats and integers, and of MXFP4, as schemes of compressed-tensors, whose
tensors these checkpoints have (``weight``, ``weight_scale``, ``input_scale``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.method import one_of

#: dtype of a spec -> type and bits
_DTYPES = {"fp8_e4m3": ("float", 8), "int8": ("int", 8), "fp4": ("float", 4)}
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
    if not one:
        return None
    kind, bits = _DTYPES[one_of(one, "dtype", tuple(_DTYPES), None)]
    strategy = _STRATEGIES[one_of(one, "qscheme", tuple(_STRATEGIES), "per_tensor")]
    found = {"num_bits": bits, "type": kind, "strategy": strategy, "dynamic": bool(one.get("is_dynamic"))}
    if one.get("symmetric") is False:
        found["symmetric"] = False
    if one.get("group_size"):
        found["group_size"] = one["group_size"]
    if one.get("block_size"):
        found["block_structure"] = one["block_size"]
    return found


def _pattern(name: str) -> str:
    """A wildcard, or what is a regular expression or a name already, as targets have it."""
    return f"re:{fnmatch.translate(name)}" if "*" in name and not name.startswith("re:") else name
