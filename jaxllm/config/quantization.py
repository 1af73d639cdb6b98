"""In which numbers weights, keys and values are stored, where these are not those of the computation."""

from __future__ import annotations

import dataclasses

from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import Arguments, argument, not_yet

#: what `quantization` may be: vLLM's names, and those of what is quantized while it is read
#: (`weights.quantization.detect`)
NAMES = (
    "aqlm",
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "bitsandbytes",
    "compressed-tensors",
    "compressed_tensors",
    "deepspeedfp",
    "experts_int8",
    "fbgemm_fp8",
    "fp8",
    "gguf",
    "gpt_oss_mxfp4",
    "gptq",
    "gptq_marlin",
    "int4",
    "int8",
    "marlin",
    "mxfp4",
    "torchao",
    "tpu_int8",
)


def _method(name: str, value: object) -> str:
    method = value.strip().lower() if isinstance(value, str) else value
    if method not in NAMES:
        raise ValidationError(f"{name}={value!r} is not known. Known are {', '.join(NAMES)}; or leave it out.")
    return str(method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Arguments):
    """Formats of storage, under vLLM's names."""

    #: of the weights
    quantization: str | None = argument(
        None,
        _method,
        "how weights are quantized; a checkpoint in 16 bits is quantized to int8, fp8 or int4 while it is read "
        "(default: as config.json says)",
        group="model",
        short="-q",
    )
    #: of keys and values
    kv_cache_dtype: str = not_yet("auto", "quantization of the KV cache")
