"""How the KV cache gets more blocks."""

from __future__ import annotations

import math

from jaxllm.tuning.advice.advice import Setting
from jaxllm.tuning.advice.load import Load

#: most of a device's memory that may be asked for: some is never free
MOST_UTILIZATION = 0.98


def more_blocks(load: Load, needed: int) -> list[Setting]:
    """The argument that decides how many blocks there are, with room for `needed` and for block 0; [] where there are
    enough, or the device cannot have them.
    """
    settings, blocks = load.settings, load.settings.num_blocks
    if blocks is None or needed < blocks:
        return []
    if settings.sized_by == "num_gpu_blocks_override":
        return [Setting("num_gpu_blocks_override", needed + 1)]
    size = settings.block_bytes
    if settings.sized_by == "kv_cache_memory_bytes" and size:
        return [Setting("kv_cache_memory_bytes", (needed + 1) * size)]
    share, total = settings.gpu_memory_utilization, settings.total_bytes
    if share and total and size:
        wanted = share + (needed + 1 - blocks) * size / total
    elif share and settings.engine == "vllm":
        # a scrape does not say how large a block is: as if nothing but blocks were in this share
        wanted = share * (needed + 1) / blocks
    else:
        return []
    wanted, note = math.ceil(1000 * wanted) / 1000, "" if total else "at most: weights take a part of it"
    return [Setting("gpu_memory_utilization", wanted, note)] if wanted <= MOST_UTILIZATION else []


def smaller_blocks(load: Load, needed: int) -> list[Setting]:
    """int8 for keys and values, where the same memory holds `needed` blocks then."""
    settings = load.settings
    size, smaller, blocks = settings.block_bytes, settings.int8_block_bytes, settings.num_blocks
    if not (size and smaller and blocks) or settings.sized_by == "num_gpu_blocks_override":
        return []
    return [Setting("kv_cache_dtype", "int8")] if blocks * size // smaller > needed else []


def more_devices(load: Load, needed: int) -> list[Setting]:
    """Twice the devices, which have half of the weights and half of each block each, where that holds `needed`."""
    settings = load.settings
    total, share, size = settings.total_bytes, settings.gpu_memory_utilization, settings.block_bytes
    arguments = "tensor_parallel_size", "pipeline_parallel_size"
    if settings.engine == "vllm":
        # twice the blocks at least: a scrape does not say how many more the other half of the weights leaves room for
        enough = 2 * (load.usable_blocks or 0) >= needed
        return [Setting(argument, 2, "twice what it is, if that is 1") for argument in arguments if enough]
    if settings.platform == "cpu" or not (total and share and size) or settings.sized_by != "gpu_memory_utilization":
        return []
    left = share * total - (settings.weight_bytes or 0) / 2 - (settings.other_bytes or 0)
    if left // (size / 2) <= needed:
        return []
    note = "" if settings.more_devices else "this machine has no more devices"
    return [Setting(argument, 2 * getattr(settings, argument), note) for argument in arguments]
