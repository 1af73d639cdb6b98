"""Files of weights, read with plain reads and not through a memory map: a map's pages count as the process's memory,
and the model would be there twice while it loads; and a file that is cut off ends the process that has it mapped.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from jaxllm.weights.errors import WeightsError


class PlainFile:
    """An open file whose tensors any thread may read.

    Raises ``WeightsError`` when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise WeightsError(f"{path}: cannot be opened: {error.strerror or error}") from error
        #: a file has one place at a time
        self._lock = threading.Lock()

    def close(self) -> None:
        self.file.close()

    def read(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], those of a tensor from `offset` on.

        Raises ``WeightsError`` after ``close``, when the system cannot read them, or when the file has become shorter.
        """
        out = np.empty(nbytes, np.uint8)
        try:
            with self._lock:
                self.file.seek(offset)
                count = self.file.readinto(out.data)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        if count != nbytes:
            raise WeightsError(f"{self.path}: tensor {name!r} is cut off: the file has become shorter")
        return out
