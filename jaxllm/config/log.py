"""The engine logs what it does while it starts and runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys


class LogHandler(logging.StreamHandler):
    """Writes lines to stderr, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        # without the module there are no bars
        beside = contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=self.stream)
        with beside:
            super().emit(record)


def show_log() -> None:
    """Write the "jaxllm" logger to stderr, unless the program has set up logging itself.

    ``JAXLLM_LOGGING_LEVEL`` (default INFO) sets how much.
    """
    logger = logging.getLogger("jaxllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("JAXLLM_LOGGING_LEVEL", "INFO").upper())
    logger.propagate = False
