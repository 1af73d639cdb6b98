"""A benchmark tells a process with an engine in it what to do by a JSON line on its standard input, and gets one back.

``{"op": "load", ...}`` starts the engine and answers what it is; ``{"op": "round", "requests": FILE, "output_len": N}``
runs the requests of a file once and answers how long that took. All engines are timed by this code.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

#: a prompt's token ids, and how many tokens to generate
Request = tuple[list[int], int]


class Session(Protocol):
    """An engine that is loaded."""

    #: version, and what else the report should say of it
    facts: dict[str, Any]

    def reset(self) -> None:
        """Forget cached prefixes, where the engine has any."""

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Greedily generate exactly the tokens asked for; returns the new ids of each request, in their order."""
        ...


def serve(load: Callable[[dict[str, Any]], Session]) -> None:
    """Answer messages until standard input ends.

    Args:
        load: makes the session out of the message "load".
    """
    # libraries print where they like: the replies keep the pipe to themselves, the rest joins the log
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    while line := sys.stdin.readline():
        message = json.loads(line)
        try:
            if message["op"] == "load":
                session = load(message)
                reply = {"facts": session.facts, "peak_rss_bytes": peak_rss_bytes()}
            else:
                assert session is not None, "a round before the engine is loaded"
                reply = timed_round(session, read_requests(message["requests"], message["output_len"]))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def timed_round(session: Session, requests: list[Request]) -> dict[str, Any]:
    """Run the requests once, without cached prefixes of an earlier round.

    Raises RuntimeError when the engine did not generate what was asked for: its time would mean nothing.
    """
    session.reset()
    gc.collect()
    began = time.perf_counter()
    outputs = session.generate(requests)
    seconds = time.perf_counter() - began
    asked, got = [length for _, length in requests], [len(ids) for ids in outputs]
    if asked != got:
        raise RuntimeError(f"asked for {sum(asked)} output tokens of {len(asked)} requests, got {sum(got)}: {got[:8]}")
    return {
        "seconds": seconds,
        "first_tokens": [ids[0] for ids in outputs],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def read_requests(path: str, output_len: int | None) -> list[Request]:
    """Read a JSON file's requests, a list of [token ids, output length]; `output_len` replaces all their lengths."""
    with open(path, encoding="utf-8") as file:
        return [(ids, length if output_len is None else output_len) for ids, length in json.load(file)]


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes
    return peak if sys.platform == "darwin" else peak * 1024
