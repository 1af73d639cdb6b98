"""One int32 buffer carries all that a step needs to know: a launch costs per argument, and an upload per array.

It holds the fields of `forward_packing`, then those of `sample_packing`, which the forward program passes on. Floats
travel as their bits. `Packing` knows the offsets of the fields, on the host and inside the compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from jaxllm.engine.step import MAX_END_TOKEN_IDS
from jaxllm.runner.buckets import Bucket

#: per-row sampling parameters, float32
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
#: per-row sampling parameters, int32
INTS = ("top_k", "seed_low", "seed_high", "prompt_length")
#: fields of float32
FLOAT_FIELDS = frozenset((*FLOATS, "extra_args"))
#: which parts of the sampler any row needs, 0 or 1
FLAGS = ("any_random", "any_truncation", "any_penalty", "any_bias", "any_mask", "any_bad_words", "want_logprobs")


class Field(NamedTuple):
    """Where a field lies in the buffer, in words."""

    start: int
    stop: int
    shape: tuple[int, ...]


class Views(Mapping[str, np.ndarray]):
    """Views into a host buffer, made when they are first asked for: most steps set few of the fields."""

    def __init__(self, buffer: np.ndarray, fields: Mapping[str, Field]):
        self._buffer, self._fields = buffer, fields
        self._views: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        view = self._views.get(name)
        if view is None:
            field = self._fields[name]
            view = self._buffer[field.start : field.stop]
            if len(field.shape) != 1:
                view = view.reshape(field.shape)
            self._views[name] = view = view.view(np.float32) if name in FLOAT_FIELDS else view
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def together(self, names: Sequence[str]) -> np.ndarray:
        """Fields that follow each other and have one length as rows of one array, int32 [len(names), length]."""
        first, last = self._fields[names[0]], self._fields[names[-1]]
        return self._buffer[first.start : last.stop].reshape(len(names), *first.shape)


class Packing:
    """Named fields of one int32 buffer.

    Args:
        shapes: name -> shape, in the order of the buffer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._fields: dict[str, Field] = {}
        #: int32 words of the buffer
        self.size = 0
        for name, shape in shapes.items():
            start, self.size = self.size, self.size + math.prod(shape)
            self._fields[name] = Field(start, self.size, shape)

    def views(self, buffer: np.ndarray) -> Views:
        """The fields of a host buffer int32 [size]."""
        return Views(buffer, self._fields)

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The fields of a device buffer, inside jit."""
        fields = {}
        for name, (start, stop, shape) in self._fields.items():
            field = buffer[start:stop].reshape(shape)
            fields[name] = lax.bitcast_convert_type(field, np.float32) if name in FLOAT_FIELDS else field
        return fields


def forward_packing(bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int) -> Packing:
    """What `step.forward_step` reads."""
    return Packing(_step_fields(bucket, num_groups, table_width, max_scored_tokens))


def decode_packing(bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int) -> Packing:
    """What `decode_steps` reads: a forward step's fields, and of each sequence how many tokens it samples at most, and
    the ids that end it (-1: none).
    """
    per_seq = {"steps": (bucket.seqs,), "end_ids": (bucket.seqs, MAX_END_TOKEN_IDS)}
    return Packing({**_step_fields(bucket, num_groups, table_width, max_scored_tokens), **per_seq})


def _step_fields(
    bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int
) -> dict[str, tuple[int, ...]]:
    return {
        **forward_fields(bucket, num_groups, table_width),
        # tokens of the step whose logits are wanted: to sample from, and to find how likely the next one was
        "sampled_tokens": (bucket.seqs,),
        "scored_tokens": (min(bucket.tokens, max_scored_tokens),),
    }


def forward_fields(bucket: Bucket, num_groups: int, table_width: int) -> dict[str, tuple[int, ...]]:
    """What every forward pass reads. The T tokens and S sequences of the bucket, G KV-cache groups, W blocks a table
    row.
    """
    tokens, seqs = bucket.tokens, bucket.seqs
    return {
        "num_decodes": (),
        "num_seqs": (),
        # tokens: id (-1: sampled by an earlier step), position, sequence
        "token_ids": (tokens,),
        "positions": (tokens,),
        "token_seq": (tokens,),
        # sequences: their row, first token, context length
        "rows": (seqs,),
        "query_start": (seqs + 1,),
        "kv_lens": (seqs,),
        "block_tables": (num_groups, seqs, table_width),
    }


def pooling_packing(bucket: Bucket, num_groups: int, table_width: int) -> Packing:
    """What `pooling_step` reads: `forward_fields`, and some of each sequence.

    Those are the components of its embedding, whether to normalise or activate, and where its second segment begins.
    """
    per_seq = dict.fromkeys(("dimensions", "activate", "segment_starts"), (bucket.seqs,))
    return Packing({**forward_fields(bucket, num_groups, table_width), **per_seq})


def sample_packing(max_num_seqs: int, num_extra_args: int) -> Packing:
    """What `step.sample_step` reads; entry i is the i-th sampled token. One layout for all buckets."""
    per_row = dict.fromkeys(("rows", "positions", *FLOATS, *INTS), (max_num_seqs,))
    extra = {"extra_args": (max_num_seqs, num_extra_args)}
    return Packing({"num_samples": (), **dict.fromkeys(FLAGS, ()), **per_row, **extra})
