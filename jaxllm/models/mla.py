"""The weights of latent attention: Hugging Face's tensor names, which all models that have it share."""
# A tree of specs has the form of `LatentWeights`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

from jaxllm.layers.mla import LatentConfig, LatentWeights
from jaxllm.layers.weight import Axis, Part, Rows, WeightSpec


def latent_specs(c: LatentConfig, *, prefix: str, layers: range, hidden_size: int, num_heads: int) -> LatentWeights:
    """A `LatentWeights` tree of `WeightSpec`s.

    Args:
        prefix: of a layer's tensors.
    """
    d, latent = Axis("embed", hidden_size), Axis("latent", c.rank)
    query = None if c.query_rank is None else Axis("query_latent", c.query_rank)

    def matrix(*parts: Part) -> WeightSpec:
        return WeightSpec(parts=parts, layers=layers)

    def part(module: str, rows: Axis, columns: Axis, place: Rows | None = None, other: Part | None = None) -> Part:
        return Part(f"{prefix}self_attn.{module}.weight", (rows, columns), place, alternative=other)

    def norm(module: str, axis: Axis) -> WeightSpec:
        return WeightSpec(parts=(Part(f"{prefix}self_attn.{module}.weight", (axis,)),), layers=layers, init=1.0)

    latents = part("kv_a_proj_with_mqa", Axis("latent", c.width), d)
    queries = Axis("heads", num_heads, c.query_dim)
    each = c.plain_dim + c.value_dim
    keys, values = (Axis("heads", num_heads, dim) for dim in (c.plain_dim, c.value_dim))
    return LatentWeights(
        down=matrix(latents) if query is None else matrix(part("q_a_proj", query, d), latents),
        query_norm=None if query is None else norm("q_a_layernorm", query),
        query_up=matrix(part("q_proj", queries, d) if query is None else part("q_b_proj", queries, query)),
        norm=norm("kv_a_layernorm", latent),
        # the checkpoint has each head's rows for its keys, then those for its values; a GGUF file has them apart
        up=matrix(
            part("kv_b_proj", keys, latent, Rows(0, each, num_heads * each), part("k_b_proj", keys, latent)),
            part(
                "kv_b_proj", values, latent, Rows(c.plain_dim, each, num_heads * each), part("v_b_proj", values, latent)
            ),
        ),
    )
