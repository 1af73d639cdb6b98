"""bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314), and INT8 (Dettmers et al. 2022,
arXiv:2208.07339).

Four bits: ``weight`` uint8 [N * K / 2, 1], the first number of a byte in its high four bits; ``weight.absmax``, the
largest number of each run of 64 in row-major order, itself in eight bits where it is quantized twice
(``weight.nested_absmax``, ``weight.nested_quant_map``); ``weight.quant_map``, the sixteen numbers; and
``weight.quant_state.bitsandbytes__nf4``, JSON. Eight bits: ``weight`` int8 [N, K] and ``SCB`` f32 [N], rows' largest
numbers. Inputs stay as they are, which is closer to the original than the library's own eight bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.layers.weight_storage import CodebookLayout, Layout, ScaledLayout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.method import HEADS, Found, Method, StoredTensors, inner, needs, one_of, packed_pairs

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: numbers that share a largest one
BLOCK = 64
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_STATE = ".weight.quant_state.bitsandbytes__"


class BitsAndBytes(Method):
    """Raises ValidationError where neither number of bits is said."""

    name = "bitsandbytes"
    tensors = (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        f"{_STATE}nf4",
        f"{_STATE}fp4",
        ".SCB",
        ".weight_format",
    )
    markers = (".weight.absmax", ".SCB")

    def __init__(self, config: Mapping[str, Any]):
        self._four = bool(config.get("load_in_4bit") or config.get("_load_in_4bit"))
        if self._four:
            one_of(config, "bnb_4bit_quant_type", ("nf4", "fp4"), "nf4")
        self._skipped = tuple(config.get("llm_int8_skip_modules") or ())

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        names = spellings(name.removesuffix(".weight"))
        # as transformers matches them: the beginning or the end of a name
        skipped = any(each.startswith(skip) or each.endswith(skip) for skip in self._skipped for each in names)
        if name.startswith(HEADS) or skipped:
            return None
        if self._four:
            return CodebookLayout(table=NF4, group=math.gcd(shape[1], BLOCK), scale_dtype="float32")
        return ScaledLayout(dtype="int8", group=0, scale_dtype="float32")

    def look(self, tensors: StoredTensors, module: str) -> Found:
        if f"{module}.SCB" in tensors.names():
            rows, columns = needs(tensors, f"{module}.weight", (None, None))
            needs(tensors, f"{module}.SCB", (rows,))
            return Found(ScaledLayout(dtype="int8", group=0, scale_dtype="float32"), (rows, columns))
        state = self._state(tensors, module)
        rows, columns = state["shape"]
        # bytes, which may be stored under another type (bnb_4bit_quant_storage)
        size = _BYTES.get(tensors.dtype(f"{module}.weight"), 1)
        needs(tensors, f"{module}.weight", (rows * columns // 2 // size, 1))
        needs(tensors, f"{module}.weight.absmax", (-(-rows * columns // int(state["blocksize"])),))
        needs(tensors, f"{module}.weight.quant_map", (16,))
        group = math.gcd(columns, int(state["blocksize"]))
        if group % 2:
            raise WeightsError(
                f"tensor {module + '.weight'!r} has {columns} numbers a row in runs of {state['blocksize']}: a row of "
                "an odd number cannot be read"
            )
        table = tuple(map(float, tensors.read(f"{module}.weight.quant_map")))
        return Found(CodebookLayout(table=table, group=group, scale_dtype="float32"), (rows, columns))

    @staticmethod
    def _state(tensors: StoredTensors, module: str) -> dict[str, Any]:
        names = tensors.names()
        for kind in ("nf4", "fp4"):
            if f"{module}{_STATE}{kind}" in names:
                return json.loads(tensors.raw(f"{module}{_STATE}{kind}").tobytes())
        raise WeightsError(
            f"the checkpoint has no tensor {module + _STATE + 'nf4'!r}, which its quantized matrix needs"
        )

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module, layout, (count, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        if kind == "values":
            return tensors.raw(f"{module}.weight")
        if isinstance(layout, ScaledLayout):
            # what the library multiplies by: the row's largest number is 127
            return tensors.read(f"{module}.SCB").reshape(-1, 1) * np.float32(1 / 127)
        assert isinstance(layout, CodebookLayout)
        if kind == "packed":
            pairs = tensors.raw(f"{module}.weight").view(np.uint8).reshape(count, columns // 2)
            codes = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(count, columns)
            return packed_pairs(codes, layout.group)
        state = self._state(tensors, module)
        largest = tensors.raw(f"{module}.weight.absmax")
        if largest.dtype == np.uint8:
            table, outer = (tensors.read(f"{module}.weight.nested_{part}") for part in ("quant_map", "absmax"))
            runs = np.arange(len(largest)) // int(state["nested_blocksize"])
            largest = table[largest] * outer[runs] + np.float32(state["nested_offset"])
        starts = np.arange(count)[:, None] * columns + np.arange(0, columns, layout.group)
        return largest[starts // int(state["blocksize"])]
