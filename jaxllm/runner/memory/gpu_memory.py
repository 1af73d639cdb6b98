"""How much of a GPU JAX may have."""

from __future__ import annotations

import os

#: of the card's memory; what is left is for CUDA itself
SHARE = 0.95
#: an engine that is to have less than this leaves room on purpose
MOST = 0.75
_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_AT_ONCE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def share_gpu_memory(gpu_memory_utilization: float) -> None:
    """Let JAX have nearly all of a GPU, unless the environment says something else.

    By itself JAX takes 75%, of which an engine could then have `gpu_memory_utilization`: a model that fits the card
    would not fit the engine. It takes them at once, in one piece, so that one engine's memory serves the next one; for
    an engine that leaves room to others, as it needs them. JAX reads its environment when it finds its devices: this
    has no effect where somebody has used them before.
    """
    if any(os.environ.get(name) for name in _SHARE_VARIABLES):
        return
    os.environ[_SHARE_VARIABLES[0]] = str(SHARE)
    if gpu_memory_utilization < MOST:
        os.environ.setdefault(_AT_ONCE, "false")
