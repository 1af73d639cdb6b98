"""Engines whose devices belong to several processes, of one machine or of several, as `jax.distributed` connects them.

Every process runs the same program: the same engine, the same calls, in the same order. Each reads the parts of the
weights that its devices have, decides what a step computes as all others do, and launches it on its devices; what comes
out of a step is whole on every device, so each process reads it from one of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.config.parallel import Grid

_LOW = 2**31
#: characters of a text that are exchanged where texts differ, and shown, some before the first that differs
_EXCHANGED, _SHOWN, _BEFORE = 4000, 100, 20


def is_distributed() -> bool:
    """Whether this process is one of several, as far as JAX knows; starts nothing."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def engine_devices(platform: str, grid: Grid) -> list[Any]:
    """The devices of an engine: this process's own where they suffice, else as many of each process, in their order.

    Returns:
        All that there are, where they do not suffice.

    Raises:
        ValidationError: the processes would not have as many each, or stages or replicas would be of several processes.
    """
    local, everything, count = jax.local_devices(backend=platform), jax.devices(platform), grid.size
    if count <= len(local):
        return local[:count]
    if count > len(everything):
        return everything
    by_process: dict[int, list[Any]] = {}
    for device in everything:
        by_process.setdefault(device.process_index, []).append(device)
    processes, fewest = len(by_process), min(map(len, by_process.values()))
    each = count // processes
    sizes = {*range(1, len(local) + 1), *range(processes, processes * fewest + 1, processes)}
    fitting = ", ".join(map(str, sorted(sizes)))
    if grid.data > 1 or grid.stage > 1:
        raise ValidationError(
            f"{grid} needs {count} devices, more than the {len(local)} of this process. Over several processes a model "
            "is split by tensor_parallel_size alone."
        )
    if count % processes or each > fewest:
        raise ValidationError(
            f"{grid}: that is more than the {len(local)} devices of this process, and {processes} processes must "
            f"have as many of them each. What would work: {fitting}."
        )
    return [device for process in sorted(by_process) for device in by_process[process][:each]]


def num_processes(devices: Iterable[Any]) -> int:
    """That the devices belong to; devices that are only described have one."""
    return len({getattr(device, "process_index", 0) for device in devices}) or 1


def of_all_processes(numbers: Sequence[int]) -> np.ndarray:
    """What each process gives, i64 [processes, len(numbers)], none negative; all of them have to call it."""
    from jax.experimental import multihost_utils

    # arrays of JAX have 32 bits
    halves = np.array([divmod(number, _LOW) for number in numbers], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(halves), np.int64).reshape(-1, len(numbers), 2)
    return gathered[..., 0] * _LOW + gathered[..., 1]


def differing(texts: Sequence[str]) -> tuple[int, list[str]] | None:
    """Compare texts with those of the other processes, all of which have to call it.

    Returns:
        None where all have the same; else the place of the first that differs, and what it is there in each process, ""
        where there is none; of long texts the part that differs.
    """
    digests = [_digest(text) for text in texts]
    found = of_all_processes([len(texts), _digest(repr(digests))])
    if (found == found[0]).all():
        return None
    longest = int(found[:, 0].max())
    found = of_all_processes(digests + [0] * (longest - len(digests)))
    place = int(np.flatnonzero((found != found[0]).any(axis=0))[0])
    mine = [ord(letter) for letter in (texts[place] if place < len(texts) else "")[:_EXCHANGED]]
    letters = of_all_processes(mine + [0] * (_EXCHANGED - len(mine)))
    whole = ["".join(chr(letter) for letter in row if letter) for row in letters]
    first = len(os.path.commonprefix(whole))
    return place, [_around(text, first) for text in whole]


def _around(text: str, place: int) -> str:
    """What stands at a place of a text, and around it."""
    first = max(place - _BEFORE, 0) if len(text) > _SHOWN else 0
    last = first + _SHOWN
    return f"{'...' if first else ''}{text[first:last]}{'...' if last < len(text) else ''}"


def _digest(text: str) -> int:
    return 1 + int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def put_whole(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of the host, whole on each device. Of several processes each puts its own onto its devices, and nobody
    compares them: `jax.device_put` would, in a program of its own.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda _: array)
