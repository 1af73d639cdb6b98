"""A GGUF file's metadata describes an HF-style ``config.json``.

GGUF keeps the hyperparameters under ``<architecture>.*`` keys. What it does not store is either implied by its
tensors (a missing ``output.weight`` means tied embeddings, ``rope_freqs.weight`` Llama 3's rope scaling) or a
constant of the family; both are noted where they are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_families import (
    LAYER_NORM,
    MODEL_CLASSES,
    PARTIAL_ROTARY,
    SPARSE,
    family_fields,
)
from jaxllm.weights.formats.gguf_header import TensorInfo
from jaxllm.weights.formats.gguf_names import KNOWN_ARCHITECTURES, ROPE_FREQS, unknown_architecture

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Meta's values for every Llama 3.1, 3.2 and 3.3; only the factor (8 or 32) differs, and it is in the tensor.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL_CONTEXT = 1.0, 4.0, 8192
_REQUIRED: Any = object()


class MetadataView:
    """Typed access to GGUF metadata; every failure is a ``WeightsError`` with the key, the value and ``source``."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source
        self.architecture: str = self.get("general.architecture", str)
        if self.architecture not in KNOWN_ARCHITECTURES:
            raise unknown_architecture(self.architecture, source)

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of ``key``, which must be a ``kind``; without ``default`` it must be there."""
        value = self.metadata.get(key, default)
        if value is _REQUIRED:
            raise WeightsError(f"{self.source}: the metadata key {key!r} is missing")
        if value is default:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WeightsError(f"{self.source}: {key!r} is {value!r:.80}, expected a value of type {kind.__name__}")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> Any:
        """``<architecture>.key``: a positive integer. A list with one value per layer must repeat one value."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or value < 1:
            problem = "is missing" if value is None else f"is {value!r:.80}, expected one positive integer"
            raise WeightsError(f"{self.source}: {full!r} {problem}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """``<architecture>.key``: a positive finite float, as the shortest decimal of the stored float32.

        Files hold float32, HF's configs the decimal it came from: 1e-05, not 9.999999747378752e-06.
        """
        full = f"{self.architecture}.{key}"
        value = self.get(full, float, default)
        if value is default:
            return default
        if not (value > 0 and math.isfinite(value)):
            raise WeightsError(f"{self.source}: {full!r} is {value!r}, expected a positive finite number")
        single = np.float32(value) if value <= np.finfo(np.float32).max else None
        return float(str(single)) if single is not None and float(single) == value else value


def hf_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rope_freqs: np.ndarray | None = None,
    source: str = "GGUF metadata",
) -> dict[str, Any]:
    """Return the HF ``config.json`` that describes the model.

    ``metadata`` and ``tensors`` are the file's (its own tensor names); ``rope_freqs`` is the float32
    ``(head_dim / 2,)`` tensor of that name if there is one. ``torch_dtype`` is the weights' float type, or
    ``bfloat16`` when they are quantised. ``eos_token_id`` is a list when the file names an end-of-turn token too.
    Raises ``WeightsError`` for an unknown architecture, a missing or malformed key, or a feature that the model
    classes do not have (experts or a partial rotary embedding in other families, other rope scalings).
    """
    view = MetadataView(metadata, source)
    heads = view.count("attention.head_count")
    hidden = view.count("embedding_length")
    if hidden % heads and f"{view.architecture}.attention.key_length" not in metadata:
        raise WeightsError(f"{source}: embedding_length {hidden} is not a multiple of attention.head_count {heads}")
    head_dim = view.count("attention.key_length", hidden // heads)
    _refuse_unsupported(view, head_dim)
    class_name, model_type = MODEL_CLASSES[view.architecture]
    # Gemma 3's converter leaves rope.freq_base out where it is the family's default.
    theta = view.positive("rope.freq_base", 1_000_000.0 if view.architecture == "gemma3" else 10_000.0)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": _layers(view, tensors),
        "num_attention_heads": heads,
        "num_key_value_heads": view.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": view.count("feed_forward_length"),
        "rope_theta": theta,
        "max_position_embeddings": view.count("context_length"),
        "vocab_size": _vocab_size(view, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "torch_dtype": _float_type(tensors),
    }
    if view.architecture in LAYER_NORM:
        config["layer_norm_eps"] = view.positive("attention.layer_norm_epsilon")
    else:
        config["rms_norm_eps"] = view.positive("attention.layer_norm_rms_epsilon")
    if view.architecture in PARTIAL_ROTARY:
        config["partial_rotary_factor"] = view.count("rope.dimension_count", head_dim) / head_dim
    scaling = _rope_scaling(view) or _llama3_scaling(rope_freqs, theta, head_dim, source)
    if scaling:
        config["rope_scaling"] = scaling
    config |= _token_ids(view)
    return config | family_fields(view, tensors, config)


def _refuse_unsupported(view: MetadataView, head_dim: int) -> None:
    if view.metadata.get(f"{view.architecture}.expert_count") and view.architecture not in SPARSE:
        raise WeightsError(
            f"{view.source}: a mixture of experts of the architecture {view.architecture!r} is not supported; with "
            f"experts, known are {', '.join(sorted(SPARSE))}"
        )
    if view.architecture == "deepseek2":
        return  # its keys are of latents
    for key in ("rope.dimension_count", "attention.value_length"):
        is_partial = key == "rope.dimension_count" and view.architecture in PARTIAL_ROTARY
        if view.count(key, head_dim) != head_dim and not is_partial:
            raise WeightsError(
                f"{view.source}: {key} is {view.count(key)} and the head dimension {head_dim}; "
                "only models where they are equal are supported"
            )


def _layers(view: MetadataView, tensors: Mapping[str, TensorInfo]) -> int:
    claimed = view.count("block_count")
    found = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    if found != claimed:
        raise WeightsError(f"{view.source}: block_count is {claimed} but there are tensors for {found} layers")
    return claimed


def _vocab_size(view: MetadataView, tensors: Mapping[str, TensorInfo]) -> int:
    if "token_embd.weight" in tensors:
        return tensors["token_embd.weight"].shape[0]
    return view.count("vocab_size", None) or len(view.get("tokenizer.ggml.tokens", list))


def _float_type(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the type that holds most of the matrices' values."""
    values = Counter[str]()
    for info in tensors.values():
        if len(info.shape) > 1:
            values[info.kind.name] += math.prod(info.shape)
    return _FLOAT_TYPES.get(values.most_common(1)[0][0], "bfloat16") if values else "bfloat16"


def _token_ids(view: MetadataView) -> dict[str, Any]:
    ids = {name: view.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("bos", "eos", "eot", "padding")}
    stops = [ids["eos"]] if ids["eos"] is not None else []
    if ids["eot"] is not None and ids["eot"] not in stops:
        stops.append(ids["eot"])
    result = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    result["eos_token_id"] = stops if len(stops) > 1 else (stops[0] if stops else None)
    return {key: value for key, value in result.items() if value is not None}


def _rope_scaling(view: MetadataView) -> dict[str, Any] | None:
    kind = view.get(f"{view.architecture}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise WeightsError(f"{view.source}: rope scaling {kind!r} is not supported; known are none, linear, yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": view.positive("rope.scaling.factor")}
    if kind == "yarn":
        context = view.count("context_length")
        scaling["original_max_position_embeddings"] = view.count("rope.scaling.original_context_length", context)
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            value = view.positive(f"rope.scaling.{name}", None)
            if value is not None:
                scaling[key] = value
    return scaling


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Llama 3's rope scaling as divisors of the inverse frequencies, float64 ``(head_dim / 2,)``.

    Meta's formula: wavelengths under ``context / high`` keep their frequency, over ``context / low`` are divided by
    ``factor``, and between them the two frequencies are blended linearly in ``context / wavelength``.
    """
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_ORIGINAL_CONTEXT * inverse / (2 * np.pi)
    blend = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


def _llama3_scaling(divisors: np.ndarray | None, theta: float, head_dim: int, source: str) -> dict[str, Any] | None:
    """Return the rope scaling whose divisors ``rope_freqs.weight`` holds; it is checked, since the file has no key."""
    if divisors is None:
        return None
    factor = float(np.max(divisors))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }
    fits = divisors.shape == (head_dim // 2,) and factor >= 1 and math.isfinite(factor)
    if not fits or not np.allclose(divisors, llama3_divisors(theta, head_dim, factor), rtol=1e-3):
        raise WeightsError(
            f"{source}: tensor {ROPE_FREQS!r} (shape {divisors.shape}, largest {factor}) is not Llama 3's rope "
            f"scaling for head dimension {head_dim}, rope_theta {theta} and {_LLAMA3_ORIGINAL_CONTEXT} positions"
        )
    return scaling
