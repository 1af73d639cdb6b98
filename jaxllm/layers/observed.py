"""A matrix that shows what it is multiplied by: how calibration sees the inputs of a model's matrices, and the model
does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """A matrix [out, in] that `linear` shows each of its inputs to, in the trace in which it is multiplied."""

    weight: jax.Array
    see: Callable[[jax.Array], None] = dataclasses.field(metadata={"static": True})
