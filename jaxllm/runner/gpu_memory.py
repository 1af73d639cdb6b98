"""How much of a GPU JAX may have."""

from __future__ import annotations

import os

#: of the card's memory; what is left is for CUDA itself
SHARE = 0.95
_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_AT_ONCE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def share_gpu_memory() -> None:
    """Let JAX have nearly all of a GPU, as it needs it, unless the environment says something else.

    By itself JAX takes 75% at its first use, of which an engine could then have `gpu_memory_utilization`: a model that
    fits the card would not fit the engine. JAX reads its environment when it finds its devices, so this has no effect
    where somebody has used them before.
    """
    if not any(os.environ.get(name) for name in _SHARE_VARIABLES):
        os.environ[_SHARE_VARIABLES[0]] = str(SHARE)
        os.environ.setdefault(_AT_ONCE, "false")
