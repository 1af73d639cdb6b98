"""GGUF files have tensor names of their own; these are Hugging Face's, with what llama.cpp's converter changed.

llama.cpp renames every tensor, stores some architectures' Q and K rows in the order that interleaved rotary
embedding wants, and adds 1 to Gemma's RMS norm weights. ``tensor_map`` says how to undo all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf_header import TensorInfo

Form = Literal["same", "row", "heads", "turned heads"]

# The rotary frequency divisors of Llama 3's rope scaling: configuration, not a weight (see gguf_config).
ROPE_FREQS = "rope_freqs.weight"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
# the tensors of a Mixtral, whose architecture is Llama's
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_SHARED_EXPERTS = {f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
_SHARED_EXPERT = {name: hf.replace("experts", "expert") for name, hf in _SHARED_EXPERTS.items()} | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate"
}
_LATENTS = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GPT_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GPT_NEOX_TOP = {
    "token_embd.weight": "gpt_neox.embed_in.weight",
    "output_norm.weight": "gpt_neox.final_layer_norm.weight",
    "output_norm.bias": "gpt_neox.final_layer_norm.bias",
    "output.weight": "embed_out.weight",
}
_PHI2 = {
    **{name: _LLAMA[name] for name in ("attn_norm", "attn_q", "attn_k", "attn_v")},
    # in older files
    "attn_qkv": "self_attn.{part}_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_PHI2_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.final_layernorm.weight",
    "output_norm.bias": "model.final_layernorm.bias",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj"}
_LAYER_NAMES = {
    "llama": _LLAMA | _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": _LLAMA | _QK_NORM | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": _LLAMA | _FUSED_MLP | {"attn_qkv": "self_attn.qkv_proj"},
    "granite": _LLAMA,
    "olmo2": _LLAMA | _QK_NORM | _POST_NORMS,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "gptneox": _GPT_NEOX,
    "phi2": _PHI2,
    "starcoder2": _LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    "nemotron": _LLAMA,
    "arcee": _LLAMA,
    # what is called so stands in front of the MLP
    "seed_oss": _LLAMA | {"post_attention_norm": "post_attention_layernorm"},
    "ernie4_5": _LLAMA,
    "exaone4": _LLAMA | _QK_NORM | _POST_NORMS,
    "hunyuan-dense": _LLAMA | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    "command-r": _LLAMA | _QK_NORM,
    "cohere2": _LLAMA,
    "glm4": _LLAMA
    | _FUSED_MLP
    | {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    "qwen2moe": _LLAMA | _EXPERTS | _SHARED_EXPERT,
    "qwen3moe": _LLAMA | _QK_NORM | _EXPERTS,
    "olmoe": _LLAMA | _QK_NORM | _EXPERTS,
    "deepseek2": _LLAMA | _LATENTS | _EXPERTS | _SHARED_EXPERTS | {"exp_probs_b": "mlp.gate.e_score_correction_bias"},
    "gpt-oss": _LLAMA
    | _EXPERTS
    | {
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "post_attention_norm": "post_attention_layernorm",
    },
}
#: tensors of a layer whose HF names have no .weight or .bias
_WITHOUT_KIND = ("attn_sinks", "exp_probs_b")
#: tensors whose axes HF has otherwise, by what `StoredTensor.form` calls it
_FORMS: dict[str, Form] = {"ffn_gate_inp_shexp": "row", "attn_k_b": "turned heads", "attn_v_b": "heads"}
#: architectures whose rows of Q and K lie in the order of interleaved rotary embedding
_INTERLEAVED = ("llama", "granite", "smollm3", "arcee")
#: architectures whose norms are stored with 1 added
_SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron")
#: what the names of layers begin with, and those of tensors outside of layers, where they are not Llama's
_OUTSIDE = {"gptneox": ("gpt_neox", _GPT_NEOX_TOP), "phi2": ("model", _PHI2_TOP)}
KNOWN_ARCHITECTURES = tuple(_LAYER_NAMES)

_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where an HF tensor is in the file: ``name`` there, what to ``subtract`` from its values, and, when its rows were
    reordered for interleaved rope, the ``rope_heads`` they belong to; or, when HF has the queries, keys and values of
    each head together and the file does not, the ``fused_heads`` (0: rows are in HF's order)."""

    name: str
    subtract: float = 0.0
    rope_heads: int = 0
    fused_heads: int = 0
    #: which of the experts that the tensor has on its first axis, each an HF tensor; None: it has no such axis
    expert: int | None = None
    #: which rows of the tensor, from the first one on, where HF has several in its place; None: all
    rows_of: tuple[int, int] | None = None
    #: how HF's axes lie there: "row", without the first one, which is 1; "heads", the first one as heads and rows of
    #: each; "turned heads", with each head's rows as columns
    form: Form = "same"

    def part(self, info: TensorInfo) -> TensorInfo:
        """The expert's part of the tensor, or some rows, as a tensor of its own."""
        nbytes = info.nbytes // info.shape[0]
        if self.rows_of is not None:
            first, count = self.rows_of
            return replace(
                info, shape=(count, *info.shape[1:]), offset=info.offset + first * nbytes, nbytes=count * nbytes
            )
        if self.expert is None:
            return info
        return replace(info, shape=info.shape[1:], offset=info.offset + self.expert * nbytes, nbytes=nbytes)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """HF's shape of a part that is stored with this one."""
        if self.form == "row":
            return (1, *stored)
        if self.form == "same":
            return stored
        heads, rows, columns = stored if self.form == "heads" else (stored[0], stored[2], stored[1])
        return (heads * rows, columns)

    def rows(self, count: int) -> np.ndarray | None:
        """For each of HF's ``count`` rows, the row where it is stored; None: the same."""
        if self.fused_heads:
            return np.arange(count).reshape(3, self.fused_heads, -1).swapaxes(0, 1).reshape(-1)
        return stored_rows(count, self.rope_heads) if self.rope_heads else None


def tensor_map(
    architecture: str, tensors: Mapping[str, TensorInfo], heads: int, kv_heads: int, source: str
) -> dict[str, StoredTensor]:
    """Map HF names to stored tensors, for the file ``source`` with these GGUF ``tensors``.

    Experts that are stacked there are tensors of their own in HF's checkpoints. So are, of latent attention, what makes
    the keys and what makes the values, where the file has both: ``k_b_proj`` and ``v_b_proj``, whose rows are those of
    HF's ``kv_b_proj``.

    ``heads``, ``kv_heads``: attention heads of Q and of K. Raises ``WeightsError`` for an unknown architecture
    or a tensor that the architecture does not have.
    """
    layer_names = _LAYER_NAMES.get(architecture)
    if layer_names is None:
        raise unknown_architecture(architecture, source)
    body, top = _OUTSIDE.get(architecture, ("model", _TOP))
    per_head = {"attn_q": heads, "attn_k": kv_heads} if architecture in _INTERLEAVED else {}
    result: dict[str, StoredTensor] = {}
    for name, info in tensors.items():
        if name == ROPE_FREQS:
            continue
        match = _LAYER_TENSOR.fullmatch(name)
        hf_part = layer_names.get(match[2]) if match else None
        if match and hf_part:
            kind = "" if match[2] in _WITHOUT_KIND else f".{match[3]}"
            hf_name = f"{body}.layers.{match[1]}.{hf_part}{kind}"
        elif name in top:
            hf_name = top[name]
        else:
            raise WeightsError(
                f"{source}: tensor {name!r} is not one that architecture {architecture!r} has; "
                f"per layer it has {', '.join(layer_names)}, besides them {', '.join(top)}"
            )
        part = match[2] if match else ""
        shifted = architecture in _SHIFTED and name.endswith("norm.weight")
        stored = StoredTensor(
            name=name,
            subtract=1.0 if shifted else 0.0,
            rope_heads=per_head.get(part, 0),
            fused_heads=heads if body == "gpt_neox" and part == "attn_qkv" else 0,
            form="same" if len(info.shape) == 2 else _FORMS.get(part, "same"),
        )
        if "{expert}" in hf_name:
            result |= {hf_name.format(expert=i): replace(stored, expert=i) for i in range(info.shape[0])}
        elif "{part}" in hf_name:
            width, odd = divmod(info.shape[0], heads + 2 * kv_heads)
            if odd:
                raise WeightsError(
                    f"{source}: tensor {name!r} has {info.shape[0]} rows, expected a multiple of its {heads} heads and "
                    f"twice {kv_heads}"
                )
            first = 0
            for of_part, rows in (("q", heads * width), ("k", kv_heads * width), ("v", kv_heads * width)):
                result[hf_name.format(part=of_part)] = replace(stored, rows_of=(first, rows))
                first += rows
        else:
            result[hf_name] = stored
    return result


def unknown_architecture(architecture: str, source: str) -> WeightsError:
    """Return the error for an architecture that is not in ``KNOWN_ARCHITECTURES``."""
    return WeightsError(
        f"{source}: the architecture {architecture!r} is not supported; known are {', '.join(KNOWN_ARCHITECTURES)}"
    )


def stored_rows(rows: int, heads: int) -> np.ndarray:
    """Return, for each HF row of a Q or K projection, the row where llama.cpp stores it; int64 ``(rows,)``.

    A head's D rows are stored as pairs (j, j + D/2) side by side: HF row ``t * D/2 + j`` is stored row ``2 * j + t``.
    """
    per_head = rows // heads
    pairs = np.arange(rows).reshape(heads, per_head // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)
