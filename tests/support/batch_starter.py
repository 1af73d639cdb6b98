"""Starts `jaxllm` commands quickly: a process that has imported everything and forks for each of them.

Its argument is a model, whose tokenizer it loads once, since that imports most. Each line of its input is a JSON list,
a command line; it answers with the pid of the fork, and with its exit status when it has ended (negative: the signal
that ended it).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# imported late by a run
import jaxllm.entrypoints.batch.run
import jaxllm.llm  # noqa: F401
from jaxllm.entrypoints.cli import main
from jaxllm.tokenization.load import load_tokenizer


def serve(model: str) -> None:
    load_tokenizer(Path(model))
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(2, 1)
                status = main(json.loads(line))
            finally:
                os._exit(status)
        print(pid, flush=True)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
