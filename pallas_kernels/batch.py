"""The ragged metadata of one step, which every operation on pages reads."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.backend import Backend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """Where each token of a step belongs. T: token bucket, S: sequence bucket, G: KV-cache groups, W: table width.

    Sequences with one query token come first, in the order of their tokens: for i < num_decodes token i belongs to
    sequence i.
    """

    token_seq: jax.Array  # i32 [T] sequence of each token; padding: 0
    positions: jax.Array  # i32 [T] position in its sequence; padding: 0
    token_valid: jax.Array  # bool [T]
    query_start: jax.Array  # i32 [S + 1] first token of each sequence
    kv_lens: jax.Array  # i32 [S] tokens in the cache after this step; padding: 0
    block_tables: jax.Array  # i32 [G, S, W]
    num_decodes: jax.Array  # i32 []
    num_seqs: jax.Array  # i32 []
    #: i32 [T] the first position that each token no longer sees, all of which this step has written: tokens of a
    #: picture see each other. Of chunks and prompts alone; None: a causal token sees up to itself
    seen_to: jax.Array | None = None
    backend: Backend = dataclasses.field(metadata={"static": True}, default=Backend())
    #: the step has single tokens only: num_decodes == num_seqs
    decode_only: bool = dataclasses.field(metadata={"static": True}, default=False)
    #: most query tokens of a sequence; None: as many as there are
    longest: int | None = dataclasses.field(metadata={"static": True}, default=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one layer's keys and values are. Traced, so that one compiled layer serves all."""

    group: jax.Array  # i32 [] which block table
    page_offset: jax.Array  # i32 [] layer's first page
    window: jax.Array  # i32 [] positions a query sees, itself included
    #: the first position of a sequence that anybody sees
    first: int = dataclasses.field(metadata={"static": True}, default=0)
