"""Intel's AutoRound (Cheng et al. 2023, arXiv:2309.05516): how weights are rounded. The tensors are GPTQ's or AWQ's;
those of floats are compressed-tensors': e4m3 with a scale a row or a matrix (``data_type`` "fp"), MXFP4 and MXFP8
("mx_fp"), NVFP4 ("nv_fp").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Layout
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.awq import AWQ
from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.gptq import GPTQ
from jaxllm.weights.quantization.groups import group_size
from jaxllm.weights.quantization.method import HEADS, Method, expression, one_of

NAME = "auto-round"
#: packing_format -> GPTQ's checkpoint_format; None: AWQ's layout
_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_gptq": "gptq",
    "auto_round:auto_awq": None,
    "auto_awq": None,
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
#: in what older versions wrote in its place (backend), the packing of what has this in its name, the first of these
_BACKENDS = {
    "awq": "auto_round:auto_awq",
    "gptqmodel": "auto_round:gptqmodel",
    "gptq": "auto_round:auto_gptq",
    "auto_round": "auto_round",
}
#: bits from which on a module is no integers
_FLOAT_BITS = 16
#: what data_type begins with
_FLOATS = ("fp", "mx_fp", "nv_fp")
_ROTATIONS = ("spinquant_config", "hadamard_config", "rotation_config", "transform_config")
_SPECIAL = set(r"*+?^$()[]{}|\\")


def auto_round(config: Mapping[str, Any]) -> Method:
    """The method that reads a checkpoint with this quantization_config.

    Raises:
        ValidationError: for other packings of integers than GPTQ's and AWQ's, other floats than those above, and inputs
            that are to be rotated.
    """
    rotation = next((name for name in _ROTATIONS if config.get(name)), None)
    if rotation is not None:
        raise ValidationError(
            f"quantization_config of config.json has rotations of inputs ({rotation}), which are not supported: take a "
            "checkpoint of the same model without them."
        )
    if str(config.get("data_type") or "int").startswith(_FLOATS):
        return _AutoRoundFloats(config)
    one_of(config, "data_type", ("int", *_FLOATS), "int")
    backend = str(config.get("backend") or "").replace("-", "_")
    older = next((packing for part, packing in _BACKENDS.items() if part in backend), "auto_round:auto_gptq")
    packing = one_of(config, "packing_format", tuple(_PACKINGS), older)
    rules = {_pattern(name): rule for name, rule in _exact_first(config.get("extra_config") or {})}
    bits = {name: int(rule.get("bits", config.get("bits", 4))) for name, rule in rules.items()}
    if _PACKINGS[packing] is None:
        odd = next((number for number in bits.values() if number not in (4, _FLOAT_BITS, 2 * _FLOAT_BITS)), None)
        if odd is not None:
            raise ValidationError(
                f"quantization_config of config.json gives a module {odd} bits in AWQ's layout, which has four: take a "
                "checkpoint with packing_format 'auto_round:auto_gptq'."
            )
        return _AutoRoundAWQ(config, rules)
    dynamic = {
        f"-:{name}" if bits[name] >= _FLOAT_BITS else f"+:{name}": {**rule, "bits": bits[name]}
        for name, rule in rules.items()
    }
    head = any("lm_head" in name and bits[name] < _FLOAT_BITS for name in rules)
    own = {**config, "checkpoint_format": _PACKINGS[packing], "desc_act": False, "dynamic": dynamic, "lm_head": head}
    return _AutoRoundGPTQ(own)


class _AutoRoundGPTQ(GPTQ):
    name = NAME


class _AutoRoundAWQ(AWQ):
    """With rules by the regular expressions of modules, of which the first that matches decides."""

    name = NAME

    def __init__(self, config: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]):
        super().__init__({**config, "version": "gemm"})
        self._rules = tuple((expression(name), rule) for name, rule in rules.items())

    def _rule(self, module: str) -> Mapping[str, Any]:
        names = spellings(module)
        return next((rule for pattern, rule in self._rules if any(map(pattern.match, names))), {})

    def _group_of(self, module: str) -> int:
        return group_size(self._rule(module), self._group)

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        bits = int(self._rule(name.removesuffix(".weight")).get("bits", 4))
        return super().planned(name, shape) if bits == 4 else None


class _AutoRoundFloats(CompressedTensors):
    """Heads stay as they are unless a rule names them."""

    name = NAME
    writes = False

    def __init__(self, config: Mapping[str, Any]):
        one_of(config, "fmt", (None, "e4m3"), None)
        rules = _exact_first(config.get("extra_config") or {})
        #: the first that matches decides; an empty scheme leaves out
        self._rules = tuple((expression(_pattern(name)), _float_scheme({**config, **rule})) for name, rule in rules)
        self._others = _float_scheme(config)
        schemes = filter(None, (self._others, *(scheme for _, scheme in self._rules)))
        super().__init__({"config_groups": dict(enumerate(schemes))})

    def _scheme(self, module: str) -> Mapping[str, Any] | None:
        if module not in self._schemes:
            names = spellings(module)
            others = {} if f"{module}.".startswith(HEADS) else self._others
            self._schemes[module] = next((s for rule, s in self._rules if any(map(rule.match, names))), others) or None
        return self._schemes[module]


def _float_scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a module, as compressed-tensors has it; empty for one that is not quantized."""
    bits, input_bits = int(config.get("bits") or _FLOAT_BITS), int(config.get("act_bits") or _FLOAT_BITS)
    if bits >= _FLOAT_BITS:
        return {}
    kind = str(config.get("data_type"))
    kind = one_of({"data_type": next(filter(kind.startswith, _FLOATS), kind)}, "data_type", _FLOATS, None)
    one_of(config, "bits", {"fp": (8,), "mx_fp": (4, 8), "nv_fp": (4,)}[kind], None)
    size = one_of(config, "group_size", {"fp": (-1, 0), "mx_fp": (32,), "nv_fp": (16,)}[kind], None)
    weights: dict[str, Any] = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": size}
    inputs = {"strategy": "group", "group_size": size, "dynamic": True}
    if kind == "fp":
        weights["strategy"] = "tensor" if size == 0 else "channel"
        is_dynamic = bool(config.get("act_dynamic", True))
        inputs = {"strategy": "token" if is_dynamic else "tensor", "dynamic": is_dynamic}
    if input_bits > 8 or bits < 8:
        return {"weights": weights}
    return {"weights": weights, "input_activations": {"num_bits": 8, "type": "float", **inputs}}


def _exact_first(rules: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(rules.items(), key=lambda rule: bool(_SPECIAL & set(rule[0])))


def _pattern(name: str) -> str:
    """A module's name, or a regular expression that is somewhere in it, as one that matches from the beginning."""
    return f".*(?:{name})" if _SPECIAL & set(name) else rf"(?:.*\.)?{re.escape(name)}$"
