"""The KV cache: what each layer keeps of a token (`KVSpec`), and the blocks and groups of layers that the host sees."""

from __future__ import annotations

import dataclasses

from jaxllm.api.errors import ValidationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What one layer keeps of each token: `parts` times `heads` vectors of `width` numbers.

    A model has one for each layer (`kv_specs`). Pages and their bytes, groups and each layer's window follow from it.
    """

    #: heads with keys and values of their own; of a split model, one device's
    heads: int
    #: numbers of each vector
    width: int
    #: 2: keys and values; 1: latents, one vector for all heads, which every device of a split model has
    parts: int = 2
    #: tokens that the layer sees, itself included, and therefore keeps; None: all
    window: int | None = None

    def page_shape(self, block_size: int) -> tuple[int, ...]:
        """Of the layer's part of one block, as `pallas_kernels.storage` lays it out."""
        return (block_size, self.width) if self.parts == 1 else (2 * self.heads, block_size, self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheGroup:
    """Layers that share one block table.

    Every group takes its blocks from the one pool; a block holds `block_size` tokens of as many layers as the largest
    group has, so all blocks have the same size in bytes.
    """

    #: indices of the model's layers in this group, in order
    layers: tuple[int, ...]
    #: tokens a layer sees, itself included; None: all
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int
    #: blocks of the pool, block 0 (trash) included
    num_blocks: int
    groups: tuple[KVCacheGroup, ...]
    enable_prefix_caching: bool = True
    #: of the host's memory, for blocks that have left the prefix cache; 0: they are lost
    num_host_blocks: int = 0


def kv_cache_groups(specs: tuple[KVSpec, ...]) -> tuple[KVCacheGroup, ...]:
    """Layers by their sliding window, in groups of one size, so that blocks of all groups have the same bytes.

    Args:
        specs: one entry a layer. They may differ in their windows, and in nothing else.

    Raises:
        ValidationError: layers keep tokens in different forms, which one array of pages cannot hold.

    The group size is the smallest number of layers that share a window; a kind with more layers fills several groups
    (the last one perhaps not whole). When the kinds are nearly equal in number, the larger number wastes less.
    """
    forms = {dataclasses.replace(spec, window=None) for spec in specs}
    if len(forms) > 1:
        raise ValidationError(
            f"layers that keep tokens in different forms are not supported: {sorted(map(str, forms))}"
        )
    kinds: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(specs):
        kinds.setdefault(spec.window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
    return tuple(
        KVCacheGroup(layers=tuple(layers[first : first + size]), sliding_window=window)
        for window, layers in kinds.items()
        for first in range(0, len(layers), size)
    )
