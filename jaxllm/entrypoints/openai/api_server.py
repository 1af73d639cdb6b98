"""vLLM's older way to start the server: ``python -m jaxllm.entrypoints.openai.api_server --model MODEL`` is
``jaxllm serve --model MODEL``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxllm.entrypoints import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Serve what the command line `argv` (default: the process's own) says; returns the exit status."""
    return cli.main(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
