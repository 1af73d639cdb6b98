"""What the blocks of the host's pool contain, and how it comes from the device and goes back (`kv_offloading_size`).

A block is one run of bytes for all layers on the host, so a copy is a few large pieces. Copies are made in lots
(`compile.block_copies`): what a program has gathered is transferred beside the next steps, and what was uploaded is
scattered when the device comes to it. Nobody waits, unless so many lots are under way that their arrays would take more
memory than was planned.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.runner.compile.block_copies import LOT_SIZES, MOST_LOTS
from jaxllm.runner.compile.programs import Programs

#: (a block of the device, a block of the host)
Copy = tuple[int, int]


class Lot:
    """Blocks on their way to the host."""

    def __init__(self, host_ids: Sequence[int], blocks: Sequence[jax.Array], into: Sequence[np.ndarray]):
        self._host_ids, self._blocks, self._into = list(host_ids), blocks, into
        for array in blocks:
            array.copy_to_host_async()

    def arrive(self) -> None:
        """Wait for them; idempotent."""
        for array, pages in zip(self._blocks, self._into, strict=True):
            pages[self._host_ids] = np.asarray(array)[: len(self._host_ids)]
        self._blocks, self._into = (), ()


class HostBlocks:
    """The host's blocks of one cache: of a pipeline, of one stage.

    Args:
        num_blocks: of the pool.
    """

    def __init__(self, programs: Programs, num_blocks: int):
        self._programs = programs
        assert programs.block_copies is not None
        tree = programs.block_copies.shapes(1)
        shapes = jax.tree.leaves(tree)
        # the system gives memory for what is written, and not before
        self._arrays = [np.empty((num_blocks, *shape.shape[1:]), shape.dtype) for shape in shapes]
        self._tree = jax.tree.structure(tree)
        self._shardings = [shape.sharding for shape in shapes]
        self._leaving: collections.deque[Lot] = collections.deque()
        self._entering: collections.deque[jax.Array] = collections.deque()

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def copy_out(self, cache: Any, copies: Sequence[Copy]) -> list[Lot]:
        """Launch copies to the host; each lot has to be told to `arrive`, in the order of the steps."""
        lots = []
        for size, lot in _lots(copies):
            blocks = self._programs.gather_blocks(size)(cache, self._ids(lot, size))
            lots.append(Lot([host_id for _, host_id in lot], jax.tree.leaves(blocks), self._arrays))
            self._leaving.append(lots[-1])
            if len(self._leaving) > MOST_LOTS:
                self._leaving.popleft().arrive()
        return lots

    def copy_in(self, cache: Any, copies: Sequence[Copy]) -> Any:
        """Launch copies to the device; returns the cache that lives on. The host's blocks have been read then."""
        for size, lot in _lots(copies):
            new = []
            for pages, sharding in zip(self._arrays, self._shardings, strict=True):
                # never reused: the device may read it in place
                staged = np.zeros((size, *pages.shape[1:]), pages.dtype)
                np.take(pages, [host_id for _, host_id in lot], axis=0, out=staged[: len(lot)], mode="clip")
                new.append(jax.device_put(staged, sharding))
            cache, done = self._programs.scatter_blocks(size)(cache, self._ids(lot, size), self._tree.unflatten(new))
            self._entering.append(done)
            if len(self._entering) > MOST_LOTS:
                self._entering.popleft().block_until_ready()
        return cache

    def warm_up(self, cache: Any, *, smallest: bool) -> Any:
        """Run the programs on the trash block; returns the cache that lives on."""
        for size in LOT_SIZES[: 1 if smallest else None]:
            self._programs.gather_blocks(size)(cache, self._ids((), size))
            zeros = (np.zeros((size, *pages.shape[1:]), pages.dtype) for pages in self._arrays)
            new = [jax.device_put(zero, own) for zero, own in zip(zeros, self._shardings, strict=True)]
            cache, _ = self._programs.scatter_blocks(size)(cache, self._ids((), size), self._tree.unflatten(new))
        return cache

    def _ids(self, lot: Sequence[Copy], size: int) -> jax.Array:
        ids = np.zeros(size, np.int32)
        ids[: len(lot)] = [block_id for block_id, _ in lot]
        return jax.device_put(ids, self._programs.sharding)

    def forget_copies(self) -> None:
        """What is under way is not waited for, as after a failed step."""
        self._leaving.clear()
        self._entering.clear()


def _lots(copies: Sequence[Copy]) -> Iterator[tuple[int, Sequence[Copy]]]:
    """(size, copies) of each lot."""
    largest = LOT_SIZES[-1]
    for first in range(0, len(copies), largest):
        lot = copies[first : first + largest]
        yield next(size for size in LOT_SIZES if size >= len(lot)), lot
