"""Buckets hold every step that the scheduler may make, and packing loses nothing on its way to the device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache import KVSpec, kv_cache_groups
from jaxllm.runner.buckets import Bucket, decode_step_buckets, draft_buckets, make_buckets, pick_bucket
from jaxllm.runner.capacities import row_capacity
from jaxllm.runner.heads.sampling_fields import FLOAT_FIELDS, forward_packing, sample_packing

LIMITS = st.tuples(st.integers(1, 20_000), st.integers(1, 1024)).filter(lambda pair: pair[0] >= pair[1])


@given(LIMITS, st.booleans(), st.booleans(), st.data())
def test_every_step_within_the_limits_has_a_bucket(
    limits: tuple[int, int], eager: bool, four_rows: bool, data: st.DataObject
):
    max_tokens, max_seqs = limits
    buckets = make_buckets(max_tokens, max_seqs, eager=eager, four_rows=four_rows)
    assert list(buckets) == sorted(set(buckets)) and len(buckets) <= (3 if eager else 17 + four_rows)
    assert (Bucket(4, min(4, max_seqs)) in buckets) == (four_rows and not eager and max_tokens > 4) or max_tokens == 4
    seqs = data.draw(st.integers(1, max_seqs))
    tokens = data.draw(st.integers(seqs, max_tokens))
    bucket = pick_bucket(buckets, tokens, seqs)
    assert bucket.tokens >= tokens and bucket.seqs >= seqs
    assert tokens > 1 or bucket.tokens == 1, "a single sequence has a step of its own"
    if not eager and tokens > 8:
        assert bucket.tokens < 2 * tokens, "padding more than doubles the step"


@given(LIMITS, st.data())
def test_steps_of_single_tokens_have_programs_of_their_own(limits: tuple[int, int], data: st.DataObject):
    max_tokens, max_seqs = limits
    buckets = make_buckets(max_tokens, max_seqs, decode_only=True)
    assert len(buckets) == len(set(buckets)) and buckets[-1].tokens == max_tokens
    assert max_tokens == 1 or not buckets[-1].decode_only, "the largest program holds any step"
    assert all(bucket.tokens == bucket.seqs for bucket in buckets if bucket.decode_only)
    seqs = data.draw(st.integers(1, max_seqs))
    assert pick_bucket(buckets, seqs, seqs).decode_only
    if seqs < max_tokens:
        tokens = data.draw(st.integers(seqs + 1, max_tokens))
        bucket = pick_bucket(buckets, tokens, seqs)
        assert not bucket.decode_only and bucket.tokens >= tokens and bucket.seqs >= seqs


@given(st.integers(1, 1024), st.sampled_from(["cpu", "cuda"]), st.booleans())
def test_launches_of_several_steps_have_few_sizes_and_the_rows_room_for_them(most: int, platform: str, eager: bool):
    rows = row_capacity(most, platform)
    ordinary = make_buckets(max(most, 64), rows, eager=eager)
    for buckets in (draft_buckets(most), decode_step_buckets(ordinary, most)):
        sizes = [bucket.seqs for bucket in buckets]
        assert sizes == sorted(set(sizes)) and most <= sizes[-1] <= rows
        assert all(size < most for size in sizes[:-1])
        assert all(bucket.tokens == bucket.seqs and bucket.decode_only for bucket in buckets)
    assert draft_buckets(0) == decode_step_buckets(ordinary, 0) == ()


def test_a_step_beyond_the_limits_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="no bucket holds 65 tokens of 2 sequences; the largest is 64 tokens x 4 seqs"):
        pick_bucket(make_buckets(64, 4), 65, 2)


@pytest.mark.parametrize(
    "packing", [forward_packing(Bucket(16, 4), 3, 7, 9), sample_packing(5, 2)], ids=["forward", "sample"]
)
def test_the_device_reads_what_the_host_wrote(packing):
    buffer = np.zeros(packing.size, np.int32)
    random = np.random.default_rng(0)
    written = {}
    for name, view in packing.views(buffer).items():
        view[...] = (
            random.standard_normal(view.shape) if name in FLOAT_FIELDS else random.integers(-5, 2**31 - 1, view.shape)
        )
        written[name] = view.copy()
    read = jax.jit(packing.unpack)(buffer)
    assert read.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(np.asarray(read[name]), value, err_msg=name)


@given(st.lists(st.sampled_from([None, 8, 16]), min_size=1, max_size=40))
def test_groups_hold_every_layer_once_with_its_window(windows: list[int | None]):
    groups = kv_cache_groups(tuple(KVSpec(heads=1, width=64, window=window) for window in windows))
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    for group in groups:
        assert {windows[layer] for layer in group.layers} == {group.sliding_window}


def test_gemma_3_1bs_layers_share_the_pool_in_groups_of_four():
    windows = (None if (i + 1) % 6 == 0 else 512 for i in range(26))
    groups = kv_cache_groups(tuple(KVSpec(heads=1, width=256, window=window) for window in windows))
    assert [(len(g.layers), g.sliding_window) for g in groups] == [(4, 512)] * 5 + [(2, 512), (4, None)]


def test_layers_that_keep_tokens_in_different_forms_are_refused():
    latent = KVSpec(heads=1, width=576, parts=1)
    with pytest.raises(ValidationError, match="different forms"):
        kv_cache_groups((KVSpec(heads=8, width=128), latent))


def test_pages_of_a_spec_hold_every_part_of_every_head():
    assert KVSpec(heads=8, width=128).page_shape(16) == (16, 16, 128)
    # an axis of size 1 would make XLA:CPU copy the cache
    assert KVSpec(heads=1, width=576, parts=1).page_shape(64) == (64, 576)
