"""transformers' KV cache, of which every key and every value of a head is rounded to 8 bits with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

#: largest magnitude, and how a number is rounded, by the engine's `kv_cache_dtype`
_FORMATS: dict[str, tuple[float, Any]] = {
    "int8": (127.0, torch.round),
    "fp8": (448.0, lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)),
    "fp8_e5m2": (57344.0, lambda x: x.to(torch.float8_e5m2).to(x.dtype)),
}


class RoundedCache(DynamicCache):
    """Rounds what it is given; attention sees nothing else, of this step's tokens too."""

    def __init__(self, kind: str):
        super().__init__()
        self._largest, self._round = _FORMATS[kind]

    def update(self, key_states: Any, value_states: Any, *where: Any, **other: Any) -> Any:
        return super().update(self._rounded(key_states), self._rounded(value_states), *where, **other)

    def _rounded(self, x: Any) -> Any:
        """Of x [batch, heads, tokens, head_dim]."""
        scale = x.abs().amax(-1, keepdim=True) / self._largest
        return self._round(x / torch.where(scale == 0, 1, scale)) * scale
