"""What a step's buffer holds for sampling: the fields of `forward_packing` or `decode_packing`, then those of
`sample_packing`, which the forward program passes on.
"""

from __future__ import annotations

from jaxllm.engine.step import MAX_END_TOKEN_IDS
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.packing import MediaFields, Packing, forward_fields

#: per-row sampling parameters, float32
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
#: per-row sampling parameters, int32
INTS = ("top_k", "seed_low", "seed_high", "prompt_length")
#: fields of float32
FLOAT_FIELDS = frozenset((*FLOATS, "extra_args"))
#: which parts of the sampler any row needs, 0 or 1
FLAGS = ("any_random", "any_truncation", "any_penalty", "any_bias", "any_mask", "any_bad_words", "want_logprobs")

#: of "begins": the row has a new request since its last launch with drafts; the model that drafts has not read all of
#: its tokens
BEGINS, GIVES_UP = 1, 2


def forward_packing(
    bucket: Bucket,
    num_groups: int,
    table_width: int,
    max_scored_tokens: int,
    *,
    media: MediaFields | None = None,
    model_drafts: bool = False,
) -> Packing:
    """What `sampling_step.forward_step` reads; where a model drafts, also whether that one reads the step."""
    fields = _step_fields(bucket, num_groups, table_width, max_scored_tokens, media=media)
    return Packing({**fields, "drafter_reads": ()} if model_drafts else fields)


def decode_packing(
    bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int, *, media: MediaFields | None = None
) -> Packing:
    """What `decode_steps.decode_steps` reads: a forward step's fields, and of each sequence how many tokens it samples
    at most, and the ids that end it (-1: none).
    """
    return Packing(_decode_fields(bucket, num_groups, table_width, max_scored_tokens, media=media))


def draft_packing(
    bucket: Bucket,
    num_groups: int,
    table_width: int,
    max_scored_tokens: int,
    num_lengths: int,
    num_drafts: int,
    *,
    media: MediaFields | None = None,
) -> Packing:
    """What `draft_steps.draft_steps` reads: the fields of `decode_packing`, the most drafts of a step, what checks of
    each length cost, the credit of new requests, and of each sequence whether it goes on where the device stands, how
    it begins (`BEGINS`, `GIVES_UP`), how many tokens steps without drafts have passed over of those that a model reads
    which drafts, and how many drafts the host has for it (-1: the device drafts), with these.
    """
    fields = _decode_fields(bucket, num_groups, table_width, max_scored_tokens, media=media)
    given = {"num_given": (bucket.seqs,), "given": (bucket.seqs, num_drafts)}
    of_all = {"most_drafts": (), "check_costs": (num_lengths,), "first_credit": ()}
    of_each = dict.fromkeys(("resumes", "begins", "passed_over"), (bucket.seqs,))
    return Packing({**fields, **of_all, **of_each, **given})


def catch_up_packing(bucket: Bucket, num_groups: int, table_width: int, *, media: MediaFields | None = None) -> Packing:
    """What `draft_steps.catch_up` reads: single tokens' fields, and two of `draft_packing`."""
    own = dict.fromkeys(("begins", "passed_over"), (bucket.seqs,))
    return Packing({**forward_fields(bucket, num_groups, table_width, media=media), **own})


def _decode_fields(
    bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int, *, media: MediaFields | None
) -> dict[str, tuple[int, ...]]:
    per_seq = {"steps": (bucket.seqs,), "end_ids": (bucket.seqs, MAX_END_TOKEN_IDS)}
    return {**_step_fields(bucket, num_groups, table_width, max_scored_tokens, media=media), **per_seq}


def _step_fields(
    bucket: Bucket, num_groups: int, table_width: int, max_scored_tokens: int, *, media: MediaFields | None
) -> dict[str, tuple[int, ...]]:
    return {
        **forward_fields(bucket, num_groups, table_width, media=media),
        # tokens of the step whose logits are wanted: to sample from, and to find how likely the next one was
        "sampled_tokens": (bucket.seqs,),
        "scored_tokens": (min(bucket.tokens, max_scored_tokens),),
    }


def sample_packing(max_num_seqs: int, num_extra_args: int, *, own_heads: bool = False) -> Packing:
    """What `sampling_step.sample_step` reads; entry i is the i-th sampled token. One layout for all buckets.

    Args:
        own_heads: whether each row says which adapter's head it may have: one more than its slot, 0 for none.
    """
    per_row = dict.fromkeys(("rows", "positions", *FLOATS, *INTS, *(("adapters",) * own_heads)), (max_num_seqs,))
    extra = {"extra_args": (max_num_seqs, num_extra_args)}
    return Packing({"num_samples": (), **dict.fromkeys(FLAGS, ()), **per_row, **extra}, floats=FLOAT_FIELDS)
