"""Matrices of a GGUF file in the blocks that it has them in (`pallas_kernels.gguf_blocks`)."""

from __future__ import annotations

import logging

import numpy as np

from jaxllm.layers.weight_storage import BlockLayout, Layout
from jaxllm.weights.quantization.method import Found, Method, StoredTensors
from pallas_kernels.gguf_blocks import BLOCKS

logger = logging.getLogger("jaxllm")


#: what tokens are looked up in, and scored by
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "gpt_neox.embed_in.weight", "embed_out.weight")


class GGUF(Method):
    """What has other types is widened."""

    name = "gguf"
    tensors = (".weight",)
    markers = ()
    whole_matrices = False

    def find(self, tensors: StoredTensors) -> dict[str, Found]:
        found, widened = {}, set()
        for name in tensors.names():
            shape, kind = tensors.shape(name), tensors.dtype(name)
            is_matrix = (".layers." in name and name.endswith(".weight")) or name in TABLES
            if is_matrix and len(shape) == 2:
                if kind in BLOCKS:
                    found[name] = Found(BlockLayout(kind), (shape[0], shape[1]))
                elif kind not in ("F32", "F16", "BF16"):
                    widened.add(kind)
        if widened:
            logger.info("Matrices of the types %s are widened while they are read.", ", ".join(sorted(widened)))
        return found

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        return None

    def look(self, tensors: StoredTensors, module: str) -> Found:
        raise AssertionError("a matrix's type says it all")

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        return tensors.raw(name, rows)
