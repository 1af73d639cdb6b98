"""Whatever is asked, a step finds in the encoder's cache what its tokens stand for, and everybody gets to the end."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.cache.block_hash import ExtraKey
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput, StepOutput
from jaxllm.multimodal.items import Grid, MediaItem, PlacedItem, PromptMedia

LARGEST = 12
#: items of every size, of which requests have some in common
ITEMS = [
    MediaItem(content_hash=f"item {number}", grid=Grid(2, 2 * size), num_tokens=size, pixels=np.zeros(0))
    for number, size in enumerate((1, 2, 5, 7, 9, LARGEST, LARGEST, 3))
]
Part = tuple[int, int | None]
#: tokens of text, then an item or none
PARTS = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(0, len(ITEMS) - 1))), min_size=1)


class Encoded:
    """What the device has: the rows of the encoder's cache, and where each request's tokens find theirs."""

    def __init__(self, num_rows: int, *, whole: bool):
        self.whole = whole
        self.rows: list[object] = [None] * (1 + num_rows)
        self.found: dict[int, dict[int, int]] = {}

    def run(self, step: SchedulerOutput) -> None:
        """A step, in the device's order; every token of an item finds that item's vector."""
        for item, rows in step.encoder_inputs:
            assert len(rows) == len(set(rows.tolist())) == item.num_tokens and 0 not in rows
            for number, row in enumerate(rows.tolist()):
                self.rows[row] = item.content_hash, number
        for admitted in step.admitted:
            self.found[admitted.row] = {}
        for row, start, rows in step.encoded_parts:
            self.found[row].update(enumerate(rows.tolist(), start))
        for row, start, count, request in zip(step.rows, step.starts, step.counts, step.requests, strict=True):
            for item in request.media.media.items if request.media else ():
                assert not (self.whole and start <= item.start < start + count < item.stop)
                assert not (self.whole and item.start < start < start + count < item.stop)
                for place in range(max(start, item.start), min(start + count, item.stop)):
                    assert self.rows[self.found[row][place]] == (item.item.content_hash, place - item.start)


def made(number: int, parts: list[Part], outputs: int) -> Request:
    tokens: list[int] = []
    items: list[PlacedItem] = []
    for text, chosen in parts:
        tokens += [1] * text
        if chosen is not None and len(tokens) + LARGEST < 90:
            item = ITEMS[chosen]
            items.append(PlacedItem(item, len(tokens), len(tokens) + item.num_tokens, item.content_hash))
            tokens += [2] * item.num_tokens
    tokens = (tokens or [1])[:90]
    media = PromptMedia(tuple(items), np.zeros((3, len(tokens)), np.int32), 0) if items else None
    keys = tuple(ExtraKey(kind="mm", value=i.key, start=i.start, stop=i.stop) for i in items)
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    return Request(f"request {number}", tokens, params, media=media, extra_keys=keys)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=8),
    room=st.integers(LARGEST, 3 * LARGEST),
    budget=st.integers(1, 2 * LARGEST),
    tokens=st.integers(4, 40),
    blocks=st.integers(28, 60),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tokens_find_their_vectors(ahead, parts, room, budget, tokens, blocks, whole, seed):
    """With chunks that cut items or must not, little room for vectors, preemptions, aborts, prefix hits, and steps that
    are scheduled before earlier ones are read.
    """
    tokens = max(tokens, LARGEST) if whole else tokens
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=tokens,
        max_model_len=100,
        encoder_cache_tokens=room,
        max_encoder_tokens=budget,
        keeps_media_whole=whole,
        long_prefill_token_threshold=seed % 3 * 4,
        reserve_full_prompt=bool(seed % 2),
    )
    groups = (KVCacheGroup(layers=(0,)),)
    cache = CacheConfig(block_size=4, num_blocks=blocks, groups=groups, enable_prefix_caching=True)
    scheduler, device, draws = Scheduler(config, cache), Encoded(room, whole=whole), random.Random(seed)
    requests = [made(number, own, draws.randint(1, 12)) for number, own in enumerate(parts)]
    waiting, in_flight = collections.deque(requests), collections.deque[SchedulerOutput]()
    for _ in range(3000):
        if waiting and draws.random() < 0.5:
            scheduler.add_request(waiting.popleft())
        if draws.random() < 0.02 and scheduler.running:
            scheduler.abort([draws.choice(scheduler.running).request_id])
        step = scheduler.schedule()
        device.run(step)
        if step.rows:
            in_flight.append(step)
        while in_flight and (len(in_flight) > ahead or not step.rows):
            done = in_flight.popleft()
            counts = [int(wanted > 0) for wanted in done.wanted]
            scheduler.update(done, StepOutput(token_ids=[3] * sum(counts), counts=counts))
        if not waiting and not scheduler.has_unfinished:
            break
    assert scheduler.media is not None
    assert all(request.is_finished for request in requests), requests
    assert all(request.status is not RequestStatus.FINISHED_ERROR for request in requests)
    assert not scheduler.media.cache.num_used and not scheduler.media._holders
    assert scheduler.reset_prefix_cache() and scheduler.media.cache.can_hold(room)
