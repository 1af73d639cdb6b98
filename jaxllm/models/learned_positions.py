"""Positions that are learned: a table whose rows are added to the embeddings, in place of rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.layers.rope import Rotary
from jaxllm.models.rope_scaling import kind_of


def with_learned_positions(hf: Mapping[str, Any], fields: Mapping[str, Any], *, first: int = 0) -> dict[str, Any]:
    """Constructor arguments of a `DecoderConfig` that has such a table.

    Args:
        fields: as `llama.common_fields` returns them.
        first: rows in front of that of the first token.

    Raises:
        ValidationError: the config asks for longer contexts than the table has rows for.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if kind_of(hf.get(name)) != "default":
            raise ValidationError(
                f"{name} stretches rotary embeddings, and this model has learned positions, "
                f"{fields['max_position_embeddings']} of them: leave it out."
            )
    rows = fields["max_position_embeddings"] + first
    return {**fields, "rope": (Rotary((0.0,)),), "position_rows": rows, "first_position": first}
