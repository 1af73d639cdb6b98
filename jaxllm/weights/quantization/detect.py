"""Which quantization a checkpoint has, and which one a name asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight_storage import Layout
from jaxllm.weights.quantization.auto_round import auto_round
from jaxllm.weights.quantization.awq import AWQ
from jaxllm.weights.quantization.bitsandbytes import BitsAndBytes
from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.fp8 import FP8
from jaxllm.weights.quantization.gguf import GGUF
from jaxllm.weights.quantization.gptq import GPTQ
from jaxllm.weights.quantization.method import Found, Method
from jaxllm.weights.quantization.modelopt import ModelOpt
from jaxllm.weights.quantization.mxfp4 import MXFP4
from jaxllm.weights.quantization.online import Online
from jaxllm.weights.quantization.quark import Quark

#: by the name that config.json gives (quant_method)
METHODS: Mapping[str, Callable[[Mapping[str, Any]], Method]] = {
    "awq": AWQ,
    "gptq": GPTQ,
    "fp8": FP8,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "mxfp4": MXFP4,
    "auto-round": auto_round,
    "modelopt": ModelOpt,
    "quark": Quark,
}
#: other names of the same
ALIASES = {
    "auto_awq": "awq",
    "awq_marlin": "awq",
    "cpu_awq": "awq",
    "auto_gptq": "gptq",
    "gptq_marlin": "gptq",
    "fbgemm_fp8": "fp8",
    "gpt_oss_mxfp4": "mxfp4",
    "compressed_tensors": "compressed-tensors",
    "tpu_int8": "int8",
    "int8_per_channel_weight_only": "int8",
    "fp8_per_channel": "fp8",
    "ptpc_fp8": "fp8",
    "petit_nvfp4": "modelopt",
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "inc": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "modelopt_mxfp8": "modelopt",
}
#: what a checkpoint in 16 bits can be quantized to while it is read
ONLINE: Mapping[str, Callable[[], Method]] = {
    "int8": lambda: Online("int8"),
    "fp8": lambda: Online("fp8"),
    "int4": lambda: Online("int4"),
    "bitsandbytes": lambda: Online("nf4"),
    "experts_int8": lambda: Online("int8", only_experts=True),
}
#: what vLLM has and jaxllm has not, and what to take
REFUSED = {
    "marlin": "these files are in the order of one GPU kernel: take the GPTQ checkpoint that they were made from",
    "deepspeedfp": 'take quantization="fp8"',
    "aqlm": "take an AWQ, GPTQ or compressed-tensors checkpoint",
    "torchao": 'take quantization="int8", "fp8" or "int4", or a compressed-tensors checkpoint',
    **dict.fromkeys(
        ("moe_wna16", "bitblas", "gptq_bitblas", "ipex", "humming", "online", "deepseek_v4_fp8"),
        "it names what computes, which is chosen here: leave it out, and config.json says how weights are stored",
    ),
    **dict.fromkeys(("fp8_per_tensor", "fp8_per_block"), 'take quantization="fp8", which has a scale a row'),
    **dict.fromkeys(
        ("mxfp8", "nvfp4_per_token", "rtn", "hqq"), 'take quantization="int8", "fp8" or "int4" of a model in 16 bits'
    ),
    **dict.fromkeys(
        ("gptq_marlin_24", "qqq", "neuron_quant", "fp_quant"), "take an AWQ, GPTQ, FP8 or compressed-tensors checkpoint"
    ),
}
#: what the algorithm of a checkpoint of ModelOpt has in its name, by the names that say which one it is
_ALGORITHMS = {
    "modelopt_fp4": "NVFP4",
    "petit_nvfp4": "NVFP4",
    "modelopt_mxfp8": "MXFP8",
    "modelopt_mixed": "MIXED_PRECISION",
}
_SIXTEEN_BITS = 'take the model in 16 bits with quantization="int4", or an AWQ, GPTQ or GGUF one'
#: of checkpoints alone
_REFUSED_CHECKPOINTS = {
    **REFUSED,
    **dict.fromkeys(("hqq", "exl2", "exl3", "mlx", "quanto", "higgs", "vptq", "eetq", "bitnet", "spqr"), _SIXTEEN_BITS),
    "fp_quant": "take an NVFP4 or MXFP4 checkpoint of compressed-tensors or ModelOpt",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Quantization:
    """A model's quantized matrices, by name."""

    method: Method
    matrices: Mapping[str, Found]

    def layout(self, name: str) -> Layout | None:
        found = self.matrices.get(name)
        return None if found is None else found.layout


def quantization_method(asked: str | None, stored: Mapping[str, Any] | None, *, is_gguf: bool = False) -> Method | None:
    """How a checkpoint's matrices are stored; None: as they are.

    Args:
        asked: the engine's `quantization`, a name of `config.quantization.NAMES`.
        stored: the checkpoint's quantization_config.
        is_gguf: whether it is a GGUF file, whose matrices are widened unless "gguf" is asked for.

    Raises:
        ValidationError: the two contradict each other, or the format is not supported; the text says what is.
    """
    kind = _kind(stored or {})
    if asked in REFUSED:
        remedy = f"{REFUSED[asked]}."
        if kind in METHODS:
            remedy = f"the checkpoint is quantized by {kind!r} (config.json). Leave quantization out."
        raise ValidationError(f"quantization={asked!r} is not supported: {remedy}")
    said, asked = asked, ALIASES.get(asked, asked) if asked else None
    if asked == GGUF.name:
        if is_gguf:
            return GGUF()
        raise ValidationError("quantization='gguf', but the model is no .gguf file. Leave quantization out.")
    if asked is not None and is_gguf and asked not in ONLINE:
        raise ValidationError(
            f"quantization={said!r}, but the model is a .gguf file. Take quantization='gguf', which leaves its blocks "
            "as they are, or leave it out."
        )
    if not stored:
        if asked is None:
            return None
        if asked not in ONLINE:
            raise ValidationError(
                f"quantization={said!r}, but the checkpoint is not quantized: its config.json has no "
                f"quantization_config. It can be quantized while it is read: {', '.join(map(repr, ONLINE))}."
            )
        return ONLINE[asked]()
    if kind not in METHODS:
        remedy = _REFUSED_CHECKPOINTS.get(
            kind, f"what can be read: {', '.join(METHODS)}, GGUF files, and weights in 16 bits"
        )
        raise ValidationError(f"The checkpoint is quantized by {kind!r}, which is not supported: {remedy}.")
    algorithm = str((stored.get("quantization") or stored).get("quant_algo") or "").upper()
    if asked is not None and (asked != kind or _ALGORITHMS.get(str(said), "") not in algorithm):
        stored_as = f"{kind!r}, {algorithm}," if algorithm else repr(kind)
        raise ValidationError(
            f"quantization={said!r}, but the checkpoint is quantized by {stored_as} (config.json). Leave quantization "
            "out, or take another checkpoint."
        )
    # one of these without schemes says something of the KV cache alone
    if kind == ModelOpt.name and not algorithm:
        return None
    method = METHODS[kind](stored)
    return None if kind == CompressedTensors.name and not stored.get("config_groups") else method


def _kind(stored: Mapping[str, Any]) -> str:
    """The name in `METHODS` of what a quantization_config is of, or the one that it has itself."""
    kind = str(stored.get("quant_method", "")).lower()
    if not kind and ("bits" in stored or "w_bit" in stored):
        kind = "awq" if "version" in stored or "zero_point" in stored else "gptq"
    if not kind and "quant_algo" in stored:
        kind = ModelOpt.name
    return ALIASES.get(kind, kind)
