"""What a decoder's layers are, in shapes and choices; a family's file makes one from a Hugging Face config."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxllm.config.cache import KVSpec
from jaxllm.layers.mla import LatentConfig
from jaxllm.layers.moe import MoEConfig
from jaxllm.layers.rope import Rotary
from jaxllm.models.names import ClassifierNames, WeightNames
from jaxllm.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes and choices of one model. Hashable: a compiled step is made for one of these."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    #: tokens of the longest context
    max_position_embeddings: int
    #: the kinds of rotary embedding
    rope: tuple[Rotary, ...]
    #: which of them each layer uses
    layer_rope: tuple[int, ...]
    #: sliding window of each layer, in tokens, itself included; None: all
    layer_window: tuple[int | None, ...]
    #: rows of the table of learned positions, whose rows are added to the embeddings; 0: there is none
    position_rows: int = 0
    #: its row of the first token
    first_position: int = 0
    #: whether neighbours are paired in rotary embeddings, not halves
    rope_interleaved: bool = False
    tie_word_embeddings: bool
    #: biases of queries, keys and values, of what follows attention, of the MLP
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    #: of the scores of the vocabulary
    head_bias: bool = False
    #: "rms", or "layer": LayerNorm
    norm: Literal["rms", "layer"] = "rms"
    #: whether the norms of hidden states have biases (of LayerNorm)
    norm_bias: bool = False
    #: a norm behind the embeddings
    embedding_norm: bool = False
    #: whether the first layer has one in front of attention, where the others have
    first_norm: bool = True
    #: norms of queries and keys
    qk_norm: bool = False
    #: "shared": of each head, all with the same weights; "own": of each head, with weights of its own; "joint": of all
    #: heads as one vector
    qk_norm_of: Literal["shared", "own", "joint"] = "shared"
    #: whether they stand behind the rotary embedding
    qk_norm_behind_rope: bool = False
    #: queries, keys and values are clipped so, on both sides; None: they are not
    qkv_clip: float | None = None
    #: a score of each head, beside those of the tokens (`layers.attention`)
    attention_sinks: bool = False
    #: norms in front of attention and MLP
    pre_norms: bool = True
    #: norms behind attention and MLP
    post_norms: bool = False
    #: added to norm weights
    norm_offset: float = 0.0
    #: attention and MLP read the same hidden states
    parallel: bool = False
    #: they read them behind the same norm, too
    shared_norm: bool = False
    #: experts in place of an MLP; None: no layer has them
    moe: MoEConfig | None = None
    #: which layers have them
    layer_moe: tuple[bool, ...] = ()
    #: latents in place of keys and values, of which `head_dim` is the queries'; None: there are none
    latents: LatentConfig | None = None
    #: the MLP multiplies by a gate
    gated_mlp: bool = True
    activation: str = "silu"
    embedding_scale: float = 1.0
    #: factor on what attention and MLP add
    residual_scale: float = 1.0
    attention_scale: float
    attention_softcap: float | None = None
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    names: WeightNames = WeightNames()
    #: `max_model_len` unless one is asked for; None: `max_position_embeddings`
    default_length: int | None = None
    #: whether a token sees only those before it; False: an embedding model made of a decoder
    causal: bool = True
    #: the head of an encoder that classifies; None: one matrix, ``score``
    classifier: ClassifierNames | None = None
    #: of positions of three axes, the frequencies of each (`layers.rope.sectioned_rope_tables`); (): they have one
    rope_sections: tuple[int, ...] = ()
    #: the tower that sees pictures; None: there is none, or it is not loaded
    vision: VisionConfig | None = None
    #: whether the tokens of a picture see each other
    sees_whole_pictures: bool = False

    @property
    def turns(self) -> bool:
        """Whether any layer has a rotary embedding."""
        return any(any(kind.inverse_frequencies) for kind in self.rope)

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each layer keeps of a token."""
        if self.latents is not None:
            return (KVSpec(parts=1, heads=1, width=self.latents.width),) * self.num_layers
        return tuple(
            KVSpec(heads=self.num_kv_heads, width=self.head_dim, window=window) for window in self.layer_window
        )


def attention_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
