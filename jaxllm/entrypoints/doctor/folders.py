"""Where models and compiled programs are kept: how much lies there, and on what kind of disk."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxllm.config.cache_folder import cache_folder

#: file systems of other machines, and those that a program behind them makes slow
SLOW = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse")
_MOUNTS = Path("/proc/self/mounts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that may not be there yet. Sizes are bytes."""

    name: str
    path: Path
    #: what lies in it; None: it is not there
    size: int | None
    writable: bool
    #: as the system calls it, such as "ext4"; "": unknown
    filesystem: str
    #: on its disk
    free: int | None

    @property
    def is_slow(self) -> bool:
        """Whether reading and writing there goes over a network."""
        return self.filesystem in SLOW


def cache_folders(environment: Mapping[str, str] = os.environ) -> list[Folder]:
    """Return jaxllm's own folders, and the Hugging Face hub's."""
    own = cache_folder()
    hub = environment.get("HF_HUB_CACHE") or Path(environment.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    return [
        folder_at("models", own / "models"),
        folder_at("programs", own / "xla"),
        folder_at("hub", Path(hub).expanduser()),
    ]


def folder_at(name: str, path: Path, mounts: Path = _MOUNTS) -> Folder:
    """Return what is known of a folder, or, where it is not there, of the place where it would be made.

    Args:
        mounts: the system's list of what is mounted where.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return Folder(
        name=name,
        path=path,
        size=_size(path) if path.is_dir() else None,
        writable=there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        filesystem=_filesystem(there.resolve(), mounts),
        free=free,
    )


def _size(path: Path) -> int:
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            try:
                # the hub's links lead to files that are counted themselves
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # it is being replaced
                continue
    return total


def _filesystem(path: Path, mounts: Path) -> str:
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found, depth = "", -1
    for line in lines:
        _, place, kind = line.split(" ")[:3]
        place = Path(place.replace("\\040", " "))
        # what is mounted later at the same place hides what was there
        if path.is_relative_to(place) and len(place.parts) >= depth:
            found, depth = kind, len(place.parts)
    return found
