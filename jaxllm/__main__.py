"""``python -m jaxllm``: the same as the command ``jaxllm``."""

from __future__ import annotations

import sys

from jaxllm.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
