"""Safetensors that are written one after the other, and their index."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import INDEX, SINGLE

#: of tensors that are kept until their file is written
KEPT_BYTES = 2 * 10**9


class ShardWriter:
    """model.safetensors, or shards and their index, in a directory that exists.

    Args:
        size: bytes of all tensors together.

    Raises:
        WeightsError: there is no room for them.
    """

    def __init__(self, directory: Path, size: int):
        free = shutil.disk_usage(directory).free
        if free < size:
            raise WeightsError(
                f"{directory.parent}: the weights take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: make "
                "room, or save elsewhere"
            )
        self._directory = directory
        self._kept: dict[str, np.ndarray] = {}
        self._kept_bytes = 0
        #: the names of each shard's tensors
        self._shards: list[list[str]] = []
        #: bytes of all tensors
        self.total = 0

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take tensors, and write what is there when it is enough for a file. Raises WeightsError as `write` does."""
        for name, array in tensors.items():
            if self._kept and self._kept_bytes + array.nbytes > KEPT_BYTES:
                self._flush()
            self._kept[name] = array
            self._kept_bytes += array.nbytes

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write one shard.

        Raises:
            WeightsError: the system cannot write.
        """
        path = self._directory / self._unfinished(len(self._shards))
        path.touch()
        mode = path.stat().st_mode
        try:
            # transformers reads only files that say so
            save_file(dict(tensors), path, {"format": "pt"})
            # the package makes files that only their owner may read
            path.chmod(mode)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: cannot be written: {error}") from error
        self._shards.append(list(tensors))
        self.total += sum(math.prod(array.shape) * array.dtype.itemsize for array in tensors.values())

    def close(self) -> None:
        """Write what is left, and give all files their names."""
        if self._kept:
            self._flush()
        count = len(self._shards)
        names = [SINGLE]
        if count > 1:
            names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2))
        for i, name in enumerate(names):
            (self._directory / self._unfinished(i)).rename(self._directory / name)

    def _flush(self) -> None:
        self.write(self._kept)
        self._kept, self._kept_bytes = {}, 0

    def _unfinished(self, number: int) -> str:
        return f"shard-{number}.safetensors"
