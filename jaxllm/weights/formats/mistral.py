"""Mistral's own form of a model: params.json, and tensors in consolidated.safetensors or in shards of that name.

Both are read as Hugging Face's. The rows of queries and keys stand there in pairs, as rotary embeddings turn them (the
reference, mistral-inference, multiplies complex numbers), where Hugging Face has the first halves of a head's pairs in
front of the second ones.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_names import stored_rows
from jaxllm.weights.formats.tensor_files import TensorFiles

logger = logging.getLogger("jaxllm")

CONFIG = "params.json"
#: what the names of its files of tensors begin with
STEM = "consolidated"
#: tokens of the longest context where no file says it; vLLM's number
DEFAULT_LENGTH = 128_000
#: of rotary embeddings where params.json has none, by whether it has a window (Mistral 7B's first version) or not
#: (Mixtral's), as mistral-inference has them
_THETAS = {True: 10_000.0, False: 1_000_000.0}

_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    **{name: name for name in ("head_dim", "vocab_size", "rope_theta", "max_position_embeddings", "dtype")},
}
#: those without which there is no model
_NEEDED = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
#: fields that ask for what no family here computes, and what that is
_REFUSED = {
    "qk_nope_head_dim": "latents in place of keys and values (Mistral Large 3)",
    "llama_4_scaling": "queries that grow with their position (Ministral 3, Mistral Large 3)",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
#: of config.json beside it, which says more about tokens
_FROM_CONFIG = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_TOP = {
    # Voxtral's files have embeddings of tokens among those of sounds
    **dict.fromkeys(
        (
            "tok_embeddings",
            "mm_whisper_embeddings.tok_embeddings",
            "mm_streams_embeddings.embedding_module.tok_embeddings",
        ),
        "model.embed_tokens",
    ),
    "norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    **dict.fromkeys(("gate", "feed_forward.gate"), "block_sparse_moe.gate"),
}
_ENDS = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
#: tensors of a quantized matrix that are of its columns, or of all of it
_WITHOUT_ROWS = ("weight_g_idx", "weight_shape")
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(\w+)")
#: in files that mistral-inference reads within the layer's feed_forward, in later ones beside it
_EXPERT = re.compile(r"(?:feed_forward\.)?experts\.(\d+)\.(w[123])")
#: what makes vectors of pictures, and scales of a cache that has scales of its own here
_LEFT_OUT = re.compile(
    r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\.|.*_fake_quantizer\."
    r"|(mm_whisper_embeddings|mm_streams_embeddings\.embedding_module)\.(?!tok_embeddings\.)"
)


def mistral_config(folder: Path, own: Mapping[str, Any], hugging_face: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model.

    Args:
        own: what params.json says.
        hugging_face: config.json beside it, {} where there is none; it says what params.json does not of tokens.

    Raises:
        ValidationError: the model is of a kind that no family computes, or quantized in an unknown way.
        WeightsError: a field is missing, or a file of tensors cannot be opened.
    """
    if missing := [name for name in _NEEDED if own.get(name) is None]:
        raise WeightsError(f"{folder / CONFIG}: there is no {missing[0]!r}, which a model of Mistral's has")
    moe = own.get("moe") or {}
    refused = [what for name, what in _REFUSED.items() if own.get(name)]
    if moe.get("num_shared_experts"):
        refused.append("experts that every token goes to (Mistral Large 3)")
    if refused:
        raise ValidationError(f"{folder / CONFIG} describes {refused[0]}, which is not supported yet.")
    if own.get("vision_encoder") or own.get("multimodal"):
        logger.warning(
            "%s: what the model sees or hears with (Pixtral's encoder, Whisper's) is not read; it takes text alone.",
            folder / CONFIG,
        )
    about_tokens = {**(hugging_face.get("text_config") or {}), **hugging_face}
    config: dict[str, Any] = {
        "max_position_embeddings": own.get("max_seq_len") or DEFAULT_LENGTH,
        "rope_theta": _THETAS[bool(own.get("sliding_window"))],
        **{name: about_tokens[name] for name in _FROM_CONFIG if about_tokens.get(name) is not None},
        **{name: own[theirs] for theirs, name in _FIELDS.items() if own.get(theirs) is not None},
    }
    if "dtype" not in config:
        config["dtype"] = _stored_dtype(folder)
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    if moe:
        if missing := [name for name in ("num_experts", "num_experts_per_tok") if name not in moe]:
            raise WeightsError(f"{folder / CONFIG}: its moe has no {missing[0]!r}")
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        config |= {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return {**config, **_window(own), **_rope(own), **_quantization(own)}


def _window(own: Mapping[str, Any]) -> dict[str, Any]:
    """One window, or a pattern of windows that the layers repeat, in which null is none."""
    window = own.get("sliding_window")
    if not isinstance(window, list):
        return {"sliding_window": window}
    sizes = {size for size in window if size is not None}
    if len(sizes) > 1:
        raise ValidationError(f"{CONFIG} has windows of several sizes ({window}), which is not supported yet.")
    kinds = ["full_attention" if size is None else "sliding_attention" for size in window]
    layers = own["n_layers"]
    return {"sliding_window": max(sizes, default=None), "layer_types": (kinds * -(-layers // len(kinds)))[:layers]}


def _rope(own: Mapping[str, Any]) -> dict[str, Any]:
    yarn = own.get("yarn")
    if not yarn:
        return {}
    scaling: dict[str, Any] = {"rope_type": "yarn"}
    scaling |= {name: yarn[theirs] for theirs, name in _YARN.items() if yarn.get(theirs) is not None}
    if not yarn.get("apply_scale", True):
        # turned vectors keep their length
        scaling["attention_factor"] = 1.0
    return {"rope_scaling": scaling}


def _quantization(own: Mapping[str, Any]) -> dict[str, Any]:
    stored = own.get("quantization")
    if not stored:
        return {}
    if str(stored.get("quant_method", "")).replace("_", "-") == "compressed-tensors":
        groups = {
            name: {**group, "targets": _modules(group.get("targets") or ())}
            for name, group in (stored.get("config_groups") or {}).items()
        }
        own_names = {"config_groups": groups, "ignore": _modules(stored.get("ignore") or ())}
        return {"quantization_config": {**stored, "quant_method": "compressed-tensors", **own_names}}
    scheme = stored.get("qscheme_act") or "TENSOR"
    if stored.get("qformat_weight") != "fp8_e4m3" or scheme not in ("TENSOR", "NO_SCALES"):
        raise ValidationError(
            f"{CONFIG} has quantization={stored}, which is not supported: fp8_e4m3 with scales of whole tensors, or "
            "compressed-tensors. Take the model in 16 bits, with quantization='fp8'."
        )
    return {
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "static" if scheme == "TENSOR" else "dynamic",
        }
    }


def _modules(names: Iterable[str]) -> list[str]:
    """Hugging Face's names of modules; what is no name of one (a kind, ``re:`` and an expression) stays."""
    return [(hugging_face_name(f"{name}.weight") or f"{name}.weight").removesuffix(".weight") for name in names]


def has_consolidated(folder: Path) -> bool:
    """Whether a folder has tensors in Mistral's form."""
    return any(folder.glob(f"{STEM}*.safetensors"))


def _stored_dtype(folder: Path) -> str:
    """What most tensors are that are no scales."""
    if not has_consolidated(folder):
        return "bfloat16"
    with TensorFiles(folder, stem=STEM) as files:
        kinds = (files.dtype(name) for name in files.names() if files.shape(name) not in ((), (1,)))
        stored = Counter(kind for kind in kinds if kind in _DTYPES)
    return _DTYPES[stored.most_common(1)[0][0]] if stored else "bfloat16"


class MistralTensors:
    """The tensors of a folder in Mistral's form, under Hugging Face's names and with their rows in its order.

    Args:
        config: the model's (`mistral_config`, or a config.json).

    Raises WeightsError as `TensorFiles` does.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self._files = TensorFiles(folder, stem=STEM)
        self._stored = {hf: name for name in self._files.names() if (hf := hugging_face_name(name)) is not None}
        text = {**config, **(config.get("text_config") or {})}
        heads = text["num_attention_heads"]
        #: of tensors whose rows are heads that turn, how many
        self._heads = {"q_proj": heads, "k_proj": text.get("num_key_value_heads") or heads}

    def __enter__(self) -> MistralTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(self._where(name))

    def dtype(self, name: str) -> str:
        return self._files.dtype(self._where(name))

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `TensorFiles.read`."""
        return self._read(self._files.read, name, rows, within)

    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        """As `TensorFiles.raw`."""
        return self._read(self._files.raw, name, rows, within)

    def _read(self, read: Any, name: str, rows: slice | None, within: int | None) -> np.ndarray:
        stored = self._where(name)
        module, _, end = name.rpartition(".")
        heads = self._heads.get(module.rpartition(".")[2])
        shape = self._files.shape(stored)
        # a scale of the whole tensor has no rows
        if heads is None or end in _WITHOUT_ROWS or not shape or shape[0] % (2 * heads):
            return read(stored, rows, within)
        if end == "weight_zero_point" and self._files.dtype(stored) == "I32":
            raise WeightsError(
                f"{self._files.path}: tensor {stored!r} has several rows in a word, whose order cannot be changed: "
                "take the model in Hugging Face's form."
            )
        wanted = stored_rows(shape[0], heads)[slice(None) if rows is None else rows]
        if not len(wanted):
            return read(stored, slice(0, 0), within)
        first = int(wanted.min())
        return read(stored, slice(first, int(wanted.max()) + 1), within)[wanted - first]

    def _where(self, name: str) -> str:
        if name not in self._stored:
            raise WeightsError(f"{self._files.path}: there is no tensor {name!r} among its {len(self._stored)} weights")
        return self._stored[name]


def hugging_face_name(name: str) -> str | None:
    """Hugging Face's name of one of Mistral's tensors; None: it is left out. An unknown one keeps its name."""
    if _LEFT_OUT.match(name):
        return None
    module, _, end = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{_ENDS.get(end, end)}"
    if (found := _IN_LAYER.fullmatch(name)) is None:
        return name
    layer, module, end = found.groups()
    if expert := _EXPERT.fullmatch(module):
        inner = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}"
    elif module in _LAYER:
        inner = _LAYER[module]
    else:
        return name
    return f"model.layers.{layer}.{inner}.{_ENDS.get(end, end)}"
