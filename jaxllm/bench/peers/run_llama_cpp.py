"""llama.cpp is a peer by its server with parallel slots, which runs in this process through xllamacpp.

It needs xllamacpp. Requests go to the server's own ``/completion`` on the loopback, which takes and returns token ids.
"""

from __future__ import annotations

import http.client
import importlib
import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from protocol import Request, Session, serve

# its extension module has no types
xllamacpp: Any = importlib.import_module("xllamacpp")


class LlamaCpp(Session):
    def __init__(self, message: dict[str, Any]):
        slots = message["max_num_seqs"]
        params = xllamacpp.CommonParams()
        params.model.path = message["model"]
        params.n_parallel = slots
        # each slot has its share of the context, in multiples of 256 tokens
        params.n_ctx = slots * -(-(message["longest"] + 1) // 256) * 256
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = message["threads"]
        # every request waits in a thread of its own
        self._in_flight = 2 * slots
        params.n_threads_http = self._in_flight + 8
        params.cache_prompt = False
        params.ui = False
        params.verbosity = 1
        self._server = xllamacpp.Server(params)
        self._address = urllib.parse.urlsplit(self._server.listening_address).netloc
        self.facts = {
            "version": version("xllamacpp"),
            "system": xllamacpp.get_system_info(),
            "slots": slots,
            "n_ctx": params.n_ctx,
            "threads": message["threads"],
        }

    def generate(self, requests: list[Request]) -> list[list[int]]:
        with ThreadPoolExecutor(self._in_flight) as pool:
            return list(pool.map(self._complete, requests))

    def _complete(self, request: Request) -> list[int]:
        ids, length = request
        body = {
            "prompt": ids,
            "n_predict": length,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            # the cheapest way to take the likeliest token
            "samplers": ["top_k"],
            "top_k": 1,
        }
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            reply = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "tokens" not in reply:
            raise RuntimeError(f"/completion answered {str(reply)[:500]}")
        return reply["tokens"]


if __name__ == "__main__":
    serve(LlamaCpp)
