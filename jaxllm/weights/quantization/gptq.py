"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): 2, 3, 4 or 8 bits in groups along the inputs.

A matrix [N, K] is ``qweight`` i32 [K * bits / 32, N], a stream of bits along K, ``qzeros`` i32 [K / g, N * bits / 32],
a stream along N, ``scales`` [K / g, N] and ``g_idx`` i32 [K], the group of each column. The first format ("gptq", or
none named) has its zero points less one: the writer takes one from each number of a word, and a zero point of 0 borrows
from its neighbour, so the ones are added to whole words; three bits, which cross words, it has modulo eight.

With act-order (``desc_act``), groups are not neighbours: columns are sorted by their group, and the input is taken in
the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Int4Layout, Layout, ReorderedLayout, ScaledLayout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.naming import spellings
from jaxllm.weights.quantization.awq import scale_dtype
from jaxllm.weights.quantization.groups import group_size, planned_group, stored_group
from jaxllm.weights.quantization.method import (
    HEADS,
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

BITS = (2, 3, 4, 8)


class GPTQ(Method):
    """Raises ValidationError for other numbers of bits, and unknown formats."""

    name = "gptq"
    tensors = (".qweight", ".qzeros", ".scales", ".g_idx")
    markers = (".qweight",)

    def __init__(self, config: Mapping[str, Any]):
        self._bits = one_of(config, "bits", BITS, 4)
        self._group = group_size(config)
        said = "marlin" if config.get("is_marlin_format") else config.get("checkpoint_format") or config.get("format")
        formats = ("gptq", "gptq_v2")
        self._less_one = one_of({"checkpoint_format": said or "gptq"}, "checkpoint_format", formats, "gptq") == "gptq"
        self._reordered = bool(config.get("desc_act"))
        self._symmetric = bool(config.get("sym", True))
        self._head = bool(config.get("lm_head"))
        #: ordered: the first that matches decides; None: what it matches is left out
        self._dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = tuple(
            (expression(name.removeprefix("-:").removeprefix("+:")), None if name.startswith("-:") else rule)
            for name, rule in (config.get("dynamic") or {}).items()
        )
        #: of modules that were asked for
        self._rules: dict[str, Mapping[str, Any] | None] = {}

    def _rule(self, module: str) -> Mapping[str, Any] | None:
        """What is otherwise for a module; None: it is left out."""
        if module not in self._rules:
            names = spellings(module)
            self._rules[module] = next((rule for pattern, rule in self._dynamic if any(map(pattern.match, names))), {})
        return self._rules[module]

    def _bits_of(self, module: str) -> int:
        return one_of(self._rule(module) or {}, "bits", BITS, self._bits)

    def _group_of(self, module: str) -> int:
        return group_size(self._rule(module) or {}, self._group)

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        module = name.removesuffix(".weight")
        rule = self._rule(module)
        if rule is None or (name.startswith(HEADS) and not self._head):
            return None
        group = planned_group(self._group_of(module), name, shape[1])
        layout = Int4Layout(group=group, scale_dtype="float16")
        if self._bits_of(module) == 8:
            symmetric = bool(rule.get("sym", self._symmetric))
            layout = ScaledLayout(dtype="int8", group=group, scale_dtype="float16", has_zeros=not symmetric)
        return ReorderedLayout(layout) if rule.get("desc_act", self._reordered) else layout

    def look(self, tensors: StoredTensors, module: str) -> Found:
        bits = self._bits_of(module)
        words, rows = needs(tensors, f"{module}.qweight", (None, None))
        columns = words * 32 // bits
        self._check_bits(tensors, module, rows)
        group = stored_group(tensors, module, columns, rows, self._group_of(module))
        groups = columns // group
        needs(tensors, f"{module}.qzeros", (groups, -(-rows * bits // 32)))
        scales = scale_dtype(tensors, f"{module}.scales")
        layout: Layout = Int4Layout(group=group, scale_dtype=scales)
        if bits == 8:
            has_zeros = bool((self._zeros(tensors, module, rows) != 128).any())
            layout = ScaledLayout(dtype="int8", group=group, scale_dtype=scales, has_zeros=has_zeros)
        if f"{module}.g_idx" in tensors.names():
            if (np.diff(check_groups(tensors, f"{module}.g_idx", columns, groups)) < 0).any():
                layout = ReorderedLayout(layout)
        return Found(layout, (rows, columns))

    def _check_bits(self, tensors: StoredTensors, module: str, rows: int) -> None:
        """Raises WeightsError where a row's zero points are of other bits than the configuration says."""
        name, bits = f"{module}.qzeros", self._bits_of(module)
        shape = needs(tensors, name, (None, None))
        words = {each: -(-rows * each // 32) for each in BITS}
        stored = [each for each in BITS if words[each] == shape[1]]
        # few rows fill as many words with some bits as with others
        if stored and bits not in stored and needs(tensors, f"{module}.scales", (None, None))[1] == rows:
            weights = f"{module}.qweight"
            raise WeightsError(
                f"tensor {name!r} has shape {shape} and tensor {weights!r} has shape {tensors.shape(weights)}: for "
                f"{rows} rows these are {stored[0]} bits, and quantization_config of config.json says bits={bits}. "
                "Correct it there; or, if the tensors are damaged, take another copy."
            )

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        module, layout, (count, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        order = np.arange(columns, dtype=np.int32)
        if isinstance(found.layout, ReorderedLayout):
            order = np.argsort(tensors.raw(f"{module}.g_idx"), kind="stable").astype(np.int32)
        if kind == "order":
            return order
        if kind == "scales":
            return tensors.read(f"{module}.scales").T
        if kind == "zeros":
            zeros = self._zeros(tensors, module, count).T
            return zeros if isinstance(layout, Int4Layout) else zeros - 128
        codes = stream(tensors.raw(f"{module}.qweight").T, self._bits_of(module), columns)[:, order]
        if isinstance(layout, Int4Layout):
            return packed_pairs(codes, layout.group)
        return (codes ^ 128).view(np.int8)

    def _zeros(self, tensors: StoredTensors, module: str, rows: int) -> np.ndarray:
        """int16 [K / g, N]."""
        words, bits = tensors.raw(f"{module}.qzeros").view(np.uint32), self._bits_of(module)
        if not self._less_one:
            return stream(words, bits, rows).astype(np.int16)
        if bits == 3:
            return (stream(words, bits, rows).astype(np.int16) + 1) & 7
        return stream(words + _ones(bits), bits, rows).astype(np.int16)

    writes = True

    def written(self, name: str, found: Found, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        module, layout, (rows, columns) = name.removesuffix(".weight"), inner(found.layout), found.shape
        bits, order = self._bits_of(module), arrays.get("order")
        if isinstance(layout, Int4Layout):
            codes, zeros = codes_of(arrays["packed"], layout.group), arrays["zeros"]
        else:
            codes = arrays["values"].view(np.uint8) ^ 128
            zeros = arrays["zeros"] + 128 if "zeros" in arrays else np.full(arrays["scales"].shape, 128)
        if columns * bits % 32 or rows * bits % 32 or max(codes.max(initial=0), zeros.max(initial=0)) >= 1 << bits:
            raise ValidationError(
                f"{module} [{rows}, {columns}] cannot be written as GPTQ of {bits} bits: rows and columns fill whole "
                "words of 32 bits, and no zero point is larger than the largest number."
            )
        zeros = np.ascontiguousarray(zeros.T).astype(np.int32)
        if not self._less_one:
            stored = as_stream(zeros, bits)
        elif bits == 3:
            stored = as_stream((zeros - 1) & 7, bits)
        else:
            stored = (as_stream(zeros, bits).view(np.uint32) - _ones(bits)).view(np.int32)
        of_column = np.arange(columns, dtype=np.int32) // (columns // arrays["scales"].shape[1])
        return {
            f"{module}.qweight": np.ascontiguousarray(as_stream(in_their_places(codes, order), bits).T),
            f"{module}.qzeros": stored,
            f"{module}.scales": np.ascontiguousarray(arrays["scales"].T),
            f"{module}.g_idx": in_their_places(of_column[None], order)[0],
        }


def _ones(bits: int) -> np.uint32:
    """A word with a one at the place of each number."""
    return np.uint32(sum(1 << place for place in range(0, 32, bits)))


def configuration(
    bits: int, group: int, *, symmetric: bool, reordered: bool, left_out: Iterable[str]
) -> dict[str, Any]:
    """quantization_config of a checkpoint in the first format.

    Args:
        group: columns that share a scale; -1: all.
        reordered: whether there is act-order.
        left_out: modules that are not quantized.
    """
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": reordered,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(module)}$": {} for module in left_out},
    }
