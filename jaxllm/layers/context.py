"""What layers are told besides their operands: how the program is compiled, and what its step computes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax

from jaxllm.layers.dense_attention import WholeSequences
from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """How a program is compiled. Layers must know it, models only hand it on. Static: a program is made for one of
    these.
    """

    #: which implementations the operations take
    backend: Backend = Backend()
    #: the logical axes of weights that are split over devices, each with the mesh axis that it is split over, or with
    #: several, the outermost first; and "tokens", where copies of the model step together, each with tokens of its own
    split: tuple[tuple[str, str | tuple[str, ...]], ...] = ()

    @property
    def deterministic(self) -> bool:
        """Whether a token's numbers must not depend, to the bit, on what it is computed with."""
        return self.backend.deterministic

    def mesh_axis(self, logical: str) -> str | tuple[str, ...] | None:
        """The mesh axis that a logical axis is split over, or several as one; None: every device has it whole."""
        return dict(self.split).get(logical)


def exchanged(logical: str) -> contextlib.AbstractContextManager[object, Any]:
    """Name what devices exchange inside by the logical axis that is split over them: compiled programs show it
    (`parallel.collectives`).
    """
    return jax.named_scope(f"over_{logical}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What a step computes. T: token bucket, S: sequence bucket.

    Optional fields are None where no request of the engine can have them, and not merely none of the step: a program
    is compiled with them or without.
    """

    tokens: jax.Array  # i32 [T], within the vocabulary; padding: any
    #: over the engine's pages; or, in training, without them
    attention: AttentionBatch | WholeSequences
    #: [T, d] vectors that prompts bring, and bool [T] which tokens have one in place of the row of the model's table;
    #: None: the engine takes none
    embeddings: jax.Array | None = None
    embedded: jax.Array | None = None
    #: i32 [3, T] positions of three axes (time, row, column), which turn queries and keys; None: `attention.positions`
    rope_positions: jax.Array | None = None
    #: [T, d] what the pipeline stage before this one made of the tokens; None: there is none
    hidden: jax.Array | None = None
    #: i32 [S] position at which each sequence's second segment begins (BERT's token types); None: there is only one
    segment_starts: jax.Array | None = None
