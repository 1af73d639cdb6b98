"""How long earlier starts took, to say how long one may take."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pallas_kernels.kept_files import write_whole

logger = logging.getLogger("jaxllm")

#: engines whose times are kept, those that started last
KEPT = 200


class StartTimes:
    """The times of one engine's last starts, in a file beside its compiled programs. No trouble with the file is worth
    a start: what cannot be read is not known, and what cannot be written is not kept.

    Args:
        folder: of the file.
        engine: what makes the engine another one.
    """

    def __init__(self, folder: Path, engine: str):
        self._path = folder / "start_times.json"
        self._engine = hashlib.sha256(engine.encode()).hexdigest()[:16]

    def read(self) -> dict[bool, float]:
        """Seconds of the last start in which programs were compiled (True), and of the last in which none was."""
        found = self._read().get(self._engine)
        if not isinstance(found, dict):
            return {}
        known = {compiled: found.get(name) for compiled, name in _NAMES.items()}
        return {compiled: seconds for compiled, seconds in known.items() if isinstance(seconds, int | float)}

    def keep(self, seconds: float, *, compiled: bool) -> None:
        """Note a start."""
        engines = self._read()
        own = engines.pop(self._engine, None)
        engines[self._engine] = {**(own if isinstance(own, dict) else {}), _NAMES[compiled]: round(seconds, 1)}
        try:
            write_whole(self._path, json.dumps(dict(list(engines.items())[-KEPT:])).encode())
        except OSError as error:
            logger.debug("How long this start took is not kept: %s", error)

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_bytes())
            if isinstance(found, dict):
                return found
        return {}


_NAMES = {True: "compiled", False: "loaded"}
