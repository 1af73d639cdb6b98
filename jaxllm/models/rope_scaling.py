"""How a Hugging Face config extends rotary embeddings to contexts longer than those that a model was trained on.

What some kinds do depends on how long the sequence is: there transformers turns the same key differently as a sequence
grows. Keys in a cache are turned once, and a cached prefix is shared by sequences of any length, so here one length
decides for all of an engine's sequences: its `max_model_len`, as in vLLM.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.rope import Rotary

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
#: older names
_ALIASES = {"su": "longrope"}
#: kinds whose `factor` multiplies the `max_position_embeddings` that the model was trained with; the others' configs
#: have the longer context there
_FACTOR_LENGTHENS = ("linear", "dynamic")


def kind_of(scaling: Mapping[str, Any] | None) -> str:
    """The name of a scaling. Raises ValidationError for one that is not supported."""
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValidationError(f"rope scaling type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    return kind


def longest_context(scaling: Mapping[str, Any] | None, max_position_embeddings: int) -> int:
    """Tokens of the longest context that a scaling makes of `max_position_embeddings`, the config's.

    For "yarn" it is the larger of this and of what the factor makes of the original length: both spellings exist.
    """
    kind = kind_of(scaling)
    if scaling is None or kind not in (*_FACTOR_LENGTHENS, "yarn") or scaling.get("factor") is None:
        return max_position_embeddings
    factor = _number(scaling, "factor")
    if kind == "yarn":
        return max(max_position_embeddings, int(factor * _original(scaling, max_position_embeddings)))
    return int(factor * max_position_embeddings)


def rotary(
    head_dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int = 0,
    max_model_len: int = 0,
) -> Rotary:
    """The rotary embedding that a config describes.

    Kinds: "default"; "linear" (position interpolation, arXiv:2306.15595); "dynamic" (a base that grows with the
    context, arXiv:2309.00071, section 3.3); "yarn" (the same paper, section 3.4); "longrope" (arXiv:2402.13753);
    "llama3" (Llama 3.1's banded interpolation).

    Args:
        scaling: `rope_scaling` or `rope_parameters` of a config.
        max_position_embeddings: the config's.
        max_model_len: tokens of the longest sequence of the engine, for those that depend on it.

    Raises:
        KeyError: a field is missing.
        ValidationError: a kind that is not supported, or a value that cannot be.
    """
    kind = kind_of(scaling)
    if (scaling or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValidationError("partial_rotary_factor is not supported: rotary embeddings turn whole heads")
    frequencies, scale = _frequencies(head_dim, theta), 1.0
    if scaling is not None and kind != "default":
        original = _original(scaling, max_position_embeddings)
        if kind == "linear":
            frequencies = frequencies / _number(scaling, "factor")
        elif kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        elif kind == "dynamic":
            frequencies = _dynamic(head_dim, theta, scaling, max_position_embeddings, max_model_len)
        elif kind == "yarn":
            frequencies, scale = _yarn(frequencies, theta, scaling, original, max_position_embeddings)
        else:
            frequencies, scale = _longrope(frequencies, scaling, original, max_position_embeddings, max_model_len)
    return Rotary(tuple(frequencies.astype(np.float32).tolist()), float(scale))


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    factor, low, high = (_number(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _number(scaling, "original_max_position_embeddings")
    rotations = context * frequencies / (2 * math.pi)  # turns over the original context
    blend = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def _dynamic(head_dim: int, theta: float, scaling: Mapping[str, Any], trained: int, longest: int) -> np.ndarray:
    factor = _number(scaling, "factor")
    growth = factor * max(longest, trained) / trained - (factor - 1)
    return _frequencies(head_dim, theta * growth ** (head_dim / (head_dim - 2)))


def _yarn(
    frequencies: np.ndarray, theta: float, scaling: Mapping[str, Any], original: int, longest: int
) -> tuple[np.ndarray, float]:
    factor = longest / original if scaling.get("factor") is None else _number(scaling, "factor")
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so often over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # a ramp of no width is a step
    interpolated = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    frequencies = interpolated * frequencies / factor + (1 - interpolated) * frequencies
    scale, up, down = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = _temperature(factor, up) / _temperature(factor, down) if up and down else _temperature(factor)
    return frequencies, scale


def _temperature(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(
    frequencies: np.ndarray, scaling: Mapping[str, Any], original: int, extended: int, longest: int
) -> tuple[np.ndarray, float]:
    which = "long" if longest > original else "short"
    divisors = np.asarray(scaling[f"{which}_factor"], np.float64)
    if divisors.shape != frequencies.shape:
        raise ValidationError(
            f"{which}_factor has {divisors.size} numbers; half a head, which it divides, has {len(frequencies)}"
        )
    factor = extended / original if scaling.get("factor") is None else _number(scaling, "factor")
    scale = scaling.get(f"{which}_mscale") or scaling.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / divisors, scale


def _original(scaling: Mapping[str, Any], max_position_embeddings: int) -> int:
    return scaling.get("original_max_position_embeddings") or max_position_embeddings


def _number(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling[name]
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
        raise ValidationError(f"{name} of rope_scaling must be a number above 0, such as 4.0; got {value!r}")
    return float(value)
