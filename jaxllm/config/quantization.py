"""In which numbers weights, keys and values are stored, where these are not those of the computation."""

from __future__ import annotations

import dataclasses

from jaxllm.config.argument import Arguments, not_yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Arguments):
    """Formats of storage, under vLLM's names."""

    #: of the weights; what a GGUF file holds is dequantised at load, whether this says so or not
    quantization: str | None = not_yet(None, "quantization", "gguf")
    #: of keys and values
    kv_cache_dtype: str = not_yet("auto", "quantization")
