"""In which numbers weights, keys and values are stored, where these are not those of the computation."""

from __future__ import annotations

import dataclasses
import difflib

from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import Arguments, argument
from jaxllm.config.argument_checks import DTYPES, one_of

#: what `quantization` may be, and does (`weights.quantization.detect`): how a checkpoint is quantized, or what one in
#: 16 bits is quantized to while it is read
METHODS = (
    "auto-round",
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "experts_int8",
    "fp8",
    "gguf",
    "gptq",
    "int4",
    "int8",
    "modelopt",
    "mxfp4",
    "quark",
)
#: vLLM's other names of them
ALIASES = (
    "auto_awq",
    "auto_gptq",
    "auto_round",
    "awq_marlin",
    "compressed_tensors",
    "cpu_awq",
    "fbgemm_fp8",
    "fp8_per_channel",
    "gpt_oss_mxfp4",
    "gptq_marlin",
    "inc",
    "int8_per_channel_weight_only",
    "intel/auto-round",
    "modelopt_fp4",
    "modelopt_mixed",
    "modelopt_mxfp8",
    "petit_nvfp4",
    "ptpc_fp8",
    "tpu_int8",
)
#: names of vLLM's that are refused with what to take
REFUSED = (
    "aqlm",
    "bitblas",
    "deepseek_v4_fp8",
    "deepspeedfp",
    "fp8_per_block",
    "fp8_per_tensor",
    "fp_quant",
    "gptq_bitblas",
    "gptq_marlin_24",
    "hqq",
    "humming",
    "ipex",
    "marlin",
    "moe_wna16",
    "mxfp8",
    "neuron_quant",
    "nvfp4_per_token",
    "online",
    "qqq",
    "rtn",
    "torchao",
)
#: all that are known
NAMES = (*METHODS, *ALIASES, *REFUSED)


def weight_method(name: str, value: object) -> str:
    method = value.strip().lower() if isinstance(value, str) else value
    if method not in NAMES:
        close = difflib.get_close_matches(str(method), (*METHODS, *ALIASES), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValidationError(f"{name}={value!r} is not known.{hint} Known are {', '.join(METHODS)}; or leave it out.")
    return str(method)


#: what the KV cache may be stored as, beside "auto" -> numpy's name of it
KV_CACHE_DTYPES = {
    **{name: name for name in DTYPES},
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}
#: vLLM's other names of them
_KV_ALIASES = {
    "float": "float32",
    "half": "float16",
    "fp8": "fp8_e4m3",
    "fp8_per_token_head": "fp8_e4m3",
    "int8_per_token_head": "int8",
}
_kv_cache_dtype = one_of("auto", *KV_CACHE_DTYPES, **_KV_ALIASES)


def _kv_dtype(name: str, value: object) -> str:
    kind = value.strip().lower() if isinstance(value, str) else ""
    if kind == "nvfp4" or kind.startswith(("int4", "int2", "turboquant")):
        raise ValidationError(
            f"{name}={value!r} is not supported: pages have numbers of 8 bits or more. Take 'int8' or 'fp8'."
        )
    return _kv_cache_dtype(name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Arguments):
    """Formats of storage, under vLLM's names."""

    #: of the weights
    quantization: str | None = argument(
        None,
        weight_method,
        "how weights are quantized; a checkpoint in 16 bits is quantized to int8, fp8, int4 or NF4 (bitsandbytes) "
        "while it is read (default: as config.json says)",
        group="model",
        short="-q",
    )
    #: of keys and values: "auto", or one of `KV_CACHE_DTYPES`
    kv_cache_dtype: str = argument(
        "auto",
        _kv_dtype,
        "what the KV cache is stored as: int8 and fp8 (fp8_e4m3, fp8_e5m2) take about half the memory of 16 bits; auto "
        "is what config.json says, else the dtype",
        group="cache",
        form=f"{{{','.join(_kv_cache_dtype.choices)}}}",
    )
