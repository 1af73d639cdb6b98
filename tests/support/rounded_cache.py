"""transformers' KV cache, of which every key and every value of a head is rounded to 8 bits with a scale of its own."""

from __future__ import annotations

from typing import Any


def rounded_cache(kv_cache_dtype: str) -> Any:
    """An empty cache; it rounds what it is given, and attention sees nothing else, of a step's own tokens neither.

    Args:
        kv_cache_dtype: the engine's.
    """
    import torch
    from transformers import DynamicCache

    #: largest magnitude, and how a number is rounded
    largest, rounded = {
        "int8": (127.0, torch.round),
        "fp8": (448.0, lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)),
        "fp8_e5m2": (57344.0, lambda x: x.to(torch.float8_e5m2).to(x.dtype)),
    }[kv_cache_dtype]

    def stored(x: Any) -> Any:
        """Of x [batch, heads, tokens, head_dim]."""
        scale = x.abs().amax(-1, keepdim=True) / largest
        return rounded(x / torch.where(scale == 0, 1, scale)) * scale

    class Rounded(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *where: Any, **other: Any) -> Any:
            return super().update(stored(key_states), stored(value_states), *where, **other)

    return Rounded()
