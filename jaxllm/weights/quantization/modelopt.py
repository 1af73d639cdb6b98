"""NVIDIA's Model Optimizer: its algorithms as schemes of compressed-tensors, whose tensors these checkpoints have under
nearly the same names.

The configuration is quantization_config of config.json, or "quantization" of ``hf_quant_config.json``. FP8: ``weight``
e4m3, ``weight_scale`` and ``input_scale`` f32 []. NVFP4: `float4`; inputs, which it has in four bits, too, stay as they
are. FP8_BLOCK_SCALES is DeepSeek's form: ``weight`` e4m3, ``weight_scale_inv`` f32 of each block, inputs in groups of
as many columns.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.method import one_of

_FLOAT8 = {"num_bits": 8, "type": "float"}
_FLOAT4 = {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}
#: by quant_algo
_SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "FP8": {
        "weights": {**_FLOAT8, "strategy": "tensor"},
        "input_activations": {**_FLOAT8, "strategy": "tensor", "dynamic": False},
    },
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "weights": {**_FLOAT8, "strategy": "channel"},
        "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True},
    },
    "FP8_PB_WO": {"weights": {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]}},
    "FP8_BLOCK_SCALES": {
        "weights": {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]},
        "input_activations": {**_FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
    },
    "NVFP4": _FLOAT4,
    "W4A16_NVFP4": _FLOAT4,
    "MXFP8": {"weights": {**_FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}},
}
MIXED = "MIXED_PRECISION"


class ModelOpt(CompressedTensors):
    """Raises ValidationError for an algorithm that is not known."""

    name = "modelopt"
    tensors = (*CompressedTensors.tensors, ".weight_scale_inv")
    markers = (*CompressedTensors.markers, ".weight_scale_inv")
    writes = False

    def __init__(self, config: Mapping[str, Any]):
        own = config.get("quantization") or config
        algorithm = str(one_of({"quant_algo": _algorithm(own)}, "quant_algo", (*_SCHEMES, MIXED), None))
        groups = {"all": {"targets": ["Linear"], **_scheme(algorithm, own)}}
        if algorithm == MIXED:
            groups = {
                name: {"targets": [name], **_scheme(self._known(name, layer), layer)}
                for name, layer in (own.get("quantized_layers") or {}).items()
            }
        ignored = own.get("exclude_modules") or own.get("ignore") or ()
        super().__init__({"config_groups": groups, "ignore": [f"re:{_pattern(each)}" for each in ignored]})

    def _group_of(self, name: str) -> Mapping[str, Any] | None:
        """Also of what is in a module that is named."""
        return super()._group_of(name) or (self._group_of(name.rpartition(".")[0]) if name else None)

    @staticmethod
    def _known(name: str, layer: Mapping[str, Any]) -> str:
        field = f"quant_algo of {name}"
        return str(one_of({field: _algorithm(layer)}, field, tuple(_SCHEMES), None))


def _scheme(algorithm: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a module, or of all; blocks may be of another size."""
    scheme, size = _SCHEMES.get(algorithm, {}), config.get("group_size")
    if algorithm != "FP8_BLOCK_SCALES" or not size:
        return scheme
    return {
        "weights": {**scheme["weights"], "block_structure": [size, size]},
        "input_activations": {**scheme["input_activations"], "group_size": size},
    }


def _algorithm(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_algo") or "").upper()


def _pattern(excluded: str) -> str:
    """A wildcard, or the name of a module with all that is in it, as a regular expression."""
    return fnmatch.translate(excluded) if "*" in excluded else rf"{re.escape(excluded)}(\..*)?$"
