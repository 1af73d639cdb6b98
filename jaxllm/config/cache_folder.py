"""jaxllm keeps what it can fetch or compute again in one folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder: ``$JAXLLM_CACHE``, else ``$XDG_CACHE_HOME/jaxllm``, else ``~/.cache/jaxllm``.

    The folder may not exist yet. The environment is read at every call.
    """
    own = os.environ.get("JAXLLM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths are invalid and to be ignored.
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "jaxllm"
