"""A Linux control group, which containers and batch jobs are, may hold a process to less than the machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
#: version 1 writes a number above this where there is no limit
_NO_LIMIT = 2**60


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlGroup:
    """What a process may use, of the machine; None: there is no limit."""

    #: processor time, in cores: a process that has had its share is stopped for the rest of each 0.1 s
    cores: float | None
    memory_bytes: int | None
    #: what is left of it to all processes of the group
    memory_left: int | None


def control_group(system: Path = _SYSTEM, own: Path = _OWN) -> ControlGroup:
    """Return the limits of this process's control groups and of all around them, of version 1 and version 2.

    Args:
        system: where the control groups are mounted.
        own: names those of this process.
    """
    cores: list[float] = []
    memory: list[int] = []
    left: list[int] = []
    for folder in _folders(system, own):
        first = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        for share in (_numbers(folder / "cpu.max"), first):
            if len(share) == 2 and share[0] > 0:
                cores.append(share[0] / share[1])
        limits = _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
        limits = [limit for limit in limits if limit < _NO_LIMIT]
        memory += limits
        used = _numbers(folder / "memory.current") + _numbers(folder / "memory.usage_in_bytes")
        left += [limit - used[0] + _given_back(folder) for limit in limits if used]
    return ControlGroup(
        cores=min(cores, default=None), memory_bytes=min(memory, default=None), memory_left=min(left, default=None)
    )


def _folders(system: Path, own: Path) -> Iterator[Path]:
    """The folder of each group that this process is in, directly or not."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # number:controllers:path; version 2 names no controllers
        _, controllers, path = line.split(":", 2)
        # a container sees its own group as the outermost one, and may be told a path that leads out of it
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield (system / controllers).joinpath(*parts[:depth])


def _given_back(folder: Path) -> int:
    """Bytes of files that a group has read: they count as used, but are given back where memory is short."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    numbers = dict(line.split() for line in lines if len(line.split()) == 2)
    # version 1 has the second one, of the groups inside as well
    return int(numbers.get("total_inactive_file") or numbers.get("inactive_file") or 0)


def _numbers(path: Path) -> list[int]:
    """The numbers in a file; none where it is not there, or says "max"."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [int(word) for word in words] if words and all(word.lstrip("-").isdigit() for word in words) else []
