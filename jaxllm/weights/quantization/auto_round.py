"""Intel's AutoRound (Cheng et al. 2023, arXiv:2309.05516): how weights are rounded; the tensors are GPTQ's or AWQ's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Layout
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.awq import AWQ
from jaxllm.weights.quantization.gptq import GPTQ
from jaxllm.weights.quantization.method import Method, expression, one_of

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
_SPECIAL = set(r"*+?^$()[]{}|\\")


def auto_round(config: Mapping[str, Any]) -> Method:
    """The method that reads a checkpoint with this quantization_config.

    Raises:
        ValidationError: for other packings than GPTQ's and AWQ's, and other numbers than integers.
    """
    one_of(config, "data_type", ("int",), "int")
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
        return _AutoRoundAWQ(config, bits)
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
    """`bits` by the regular expressions of modules, of which the first that matches decides."""

    name = NAME

    def __init__(self, config: Mapping[str, Any], bits: Mapping[str, int]):
        super().__init__({**config, "version": "gemm"})
        self._bits = tuple((expression(name), number) for name, number in bits.items())

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        names = spellings(name.removesuffix(".weight"))
        found = next((bits for pattern, bits in self._bits if any(map(pattern.match, names))), 4)
        return super().planned(name, shape) if found == 4 else None


def _exact_first(rules: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(rules.items(), key=lambda rule: bool(_SPECIAL & set(rule[0])))


def _pattern(name: str) -> str:
    """A module's name, or a regular expression that is somewhere in it, as one that matches from the beginning."""
    return f".*(?:{name})" if _SPECIAL & set(name) else rf"(?:.*\.)?{re.escape(name)}$"
