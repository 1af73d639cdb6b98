"""MXFP4 (OCP Microscaling Formats 1.0): four-bit floats (e2m1) in groups of 32 with an exponent of two (e8m0) each.

GPT-OSS has its experts so, those of a layer stacked: ``gate_up_proj_blocks`` uint8 [E, N, K / 32, 16], two numbers a
byte, the first in the low four bits, and ``gate_up_proj_scales`` uint8 [E, N, K / 32].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.layers.weight_storage import Layout
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.float4 import LAYOUTS, nibbles
from jaxllm.weights.quantization.method import Found, Method, StoredTensors, matches, needs, packed_pairs

GROUP = 32
_LAYOUT = LAYOUTS[GROUP]


class MXFP4(Method):
    """Of stacked experts."""

    name = "mxfp4"
    tensors = ("_blocks", "_scales")
    markers = ("_blocks",)
    whole_matrices = False

    def __init__(self, config: Mapping[str, Any]):
        self._left_out = tuple(config.get("modules_to_not_convert") or ())

    def find(self, tensors: StoredTensors) -> dict[str, Found]:
        stacks = [name.removesuffix("_blocks") for name in tensors.names() if name.endswith("_blocks")]
        return {stack: self.look(tensors, stack) for stack in stacks}

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        is_expert = ".experts." in name and not name.endswith(".weight")
        left_out = any(matches(pattern, each) for pattern in self._left_out for each in spellings(name))
        return _LAYOUT if is_expert and shape[1] % GROUP == 0 and not left_out else None

    def look(self, tensors: StoredTensors, module: str) -> Found:
        experts, rows, groups, _ = needs(tensors, f"{module}_blocks", (None, None, None, GROUP // 2))
        needs(tensors, f"{module}_scales", (experts, rows, groups))
        return Found(_LAYOUT, (rows, groups * GROUP), stacked=experts)

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        stored = tensors.raw(f"{name}_{'blocks' if kind == 'packed' else 'scales'}", rows, within)
        if kind == "scales":
            return stored
        return packed_pairs(nibbles(stored.reshape(len(stored), -1)), GROUP)
