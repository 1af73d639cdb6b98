"""Prefixes that had been computed were computed again: their blocks were evicted, or belonged to another salt."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load
from jaxllm.tuning.advice.memory import more_blocks

EVICTED, SALTED = "evicted prefixes", "salted prefixes"
#: of the tokens that the cache was asked for, what is worth a word
SHARE = 0.01
_GIB = 2**30


def advise(load: Load) -> Iterator[Advice]:
    """As many blocks as would have kept them, or a place for them in the host's memory; one salt for all."""
    yield from _evicted(load)
    yield from _idle(load)
    lost, requests = load.count("jaxllm:prefix_cache_salted"), int(load.count("jaxllm:prefix_cache_salted_requests"))
    asked = load.count("vllm:prefix_cache_queries")
    if lost and lost >= SHARE * asked:
        yield Advice(
            kind=SALTED,
            evidence=f"{lost:.0f} of {asked:.0f} tokens were there under another cache_salt, for {requests} requests",
            numbers={"salted_tokens": lost, "queries": asked, "requests": requests},
            setting=Setting("cache_salt", None, "of prompts; or one salt for all who may share what they were sent"),
        )


def _evicted(load: Load) -> Iterator[Advice]:
    lost, asked = load.count("jaxllm:prefix_cache_evicted"), load.count("vllm:prefix_cache_queries")
    missing, usable = int(load.gauge("jaxllm:prefix_cache_missing_blocks")), load.usable_blocks
    if not lost or lost < SHARE * asked or not missing or usable is None:
        return
    found = more_blocks(load, usable + missing)
    size = load.settings.host_block_bytes
    if size:
        more = math.ceil(1000 * missing * size / _GIB) / 1000
        found.append(
            Setting("kv_offloading_size", round(load.settings.kv_offloading_size + more, 3), "GiB of the host")
        )
    if not found:
        return
    hits = load.count("vllm:prefix_cache_hits")
    yield Advice(
        kind=EVICTED,
        evidence=f"{lost:.0f} of {asked:.0f} tokens had been in the prefix cache and were evicted before they were "
        f"asked for again (it had {hits:.0f}); {missing} blocks more than {usable} would have kept them",
        numbers={"evicted_tokens": lost, "queries": asked, "hits": hits, "missing_blocks": missing},
        setting=found[0],
        instead=tuple(found[1:]),
    )


def _idle(load: Load) -> Iterator[Advice]:
    """vLLM measures (``--kv-cache-metrics``) how long blocks had been idle when they were evicted, and after what time
    others were used again.
    """
    reused = load.at_most("vllm:kv_block_reuse_gap_seconds", 0.9)
    evicted = load.at_most("vllm:kv_block_idle_before_evict_seconds", 0.5)
    share = load.settings.gpu_memory_utilization or 0.9
    if reused is None or evicted is None or evicted > reused or share >= 0.95:
        return
    yield Advice(
        kind=EVICTED,
        evidence=f"half of the evicted blocks had been idle for at most {evicted:g} s, and of those that were used "
        f"again a tenth had been idle for longer than half of {reused:g} s",
        numbers={"idle_before_evict": evicted, "reuse_gap": reused},
        setting=Setting("gpu_memory_utilization", 0.95),
        instead=(Setting("kv_offloading_size", 4.0, "GiB of the host's memory"),),
    )
