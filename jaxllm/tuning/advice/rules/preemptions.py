"""Running requests outgrew the KV cache, and some were put back to be computed again."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load
from jaxllm.tuning.advice.memory import MOST_UTILIZATION, more_blocks, more_devices, smaller_blocks

KIND = "preemptions"
#: share of the requests whose outputs may be cut
FEW = 0.25


def advise(load: Load) -> Iterator[Advice]:
    """With the values that are named, the same requests in any order lack no block: the longest of them, as many as run
    at once, all at their ends.
    """
    count = int(load.count("vllm:num_preemptions"))
    if not count:
        return
    lost, usable = int(load.count("jaxllm:preempted_tokens")), load.usable_blocks
    rows = load.rows or len(load.longest)
    at_once = load.longest[:rows]
    needed = sum(load.blocks(tokens) for tokens in at_once)
    settings: list[Setting] = []
    if usable is None or not at_once:
        share = load.settings.gpu_memory_utilization or 0.9
        settings.append(Setting("gpu_memory_utilization", min(round(share + 0.05, 3), MOST_UTILIZATION)))
    else:
        settings += more_blocks(load, needed)
        fits = load.room()
        if fits < rows:
            settings.append(Setting("max_num_seqs", fits, "fewer requests at once"))
        settings += smaller_blocks(load, needed)
        settings += more_devices(load, needed)
        settings += _shorter(load, rows)
    if not settings:
        return
    evidence = f"{count} preemption{'s' if count > 1 else ''}"
    evidence += f" lost {lost} computed tokens" if lost else ""
    if usable is not None and at_once:
        evidence += (
            f"; the KV cache has {usable} blocks, and the {len(at_once)} longest requests that may run at once need "
            f"{needed}"
        )
    numbers = {"preemptions": count, "lost_tokens": lost, "blocks": usable or 0, "blocks_needed": needed}
    yield Advice(kind=KIND, evidence=evidence, numbers=numbers, setting=settings[0], instead=tuple(settings[1:]))


def _shorter(load: Load, rows: int) -> list[Setting]:
    """Requests of which as many as run at once fit, whatever they are, where that cuts few outputs."""
    size, usable, windows = load.settings.block_size, load.usable_blocks, load.settings.windows
    if not size or not usable or not load.lengths or windows != (None,):
        return []
    length = usable // rows * size
    cut = sum(tokens > length for tokens in load.longest)
    if any(prompt >= length for prompt, _ in load.lengths) or not 0 < cut <= FEW * len(load.lengths):
        return []
    return [Setting("max_model_len", length, f"cuts the outputs of {cut} of {len(load.lengths)} requests")]
