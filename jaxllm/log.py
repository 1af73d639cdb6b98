"""What the engine says while it starts and runs."""

from __future__ import annotations

import logging
import os


def show_log() -> None:
    """Write the "jaxllm" logger to stderr, unless the program has set up logging itself.

    ``JAXLLM_LOGGING_LEVEL`` (default INFO) sets how much.
    """
    logger = logging.getLogger("jaxllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("JAXLLM_LOGGING_LEVEL", "INFO").upper())
    logger.propagate = False
